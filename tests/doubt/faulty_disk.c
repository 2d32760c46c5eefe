/* Disks that hang, are slow, or fail: preloaded into the processes of a test's cluster.
 *
 * The file that $UNDERSTUDY_FAULTS names has a line for each faulty folder:
 *
 *     hang FOLDER        fsync of files in it does not come back until the line is gone
 *     delay:MS FOLDER    fsync of files in it takes so long
 *     fail FOLDER        fsync of files in it fails with EIO
 *     lost FOLDER        the disk does not have the second half of files in it: the page cache does,
 *                        until it is told to forget them
 *
 * It is read at every call: a test breaks and repairs a disk by writing it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* What is wrong with the disk of this file: 0 nothing, -1 hangs, -2 fails, -3 has lost data, else
 * milliseconds. */
static long fault(int fd) {
    const char *list = getenv("UNDERSTUDY_FAULTS");
    char link[64], path[PATH_MAX], line[PATH_MAX + 64], folder[PATH_MAX], what[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (list == NULL || length <= 0)
        return 0;
    path[length] = 0;
    FILE *file = fopen(list, "re");
    if (file == NULL)
        return 0;
    long found = 0;
    while (found == 0 && fgets(line, sizeof line, file) != NULL) {
        if (sscanf(line, "%63s %4095s", what, folder) != 2)
            continue;
        if (strncmp(path, folder, strlen(folder)) != 0)
            continue;
        if (strcmp(what, "hang") == 0)
            found = -1;
        else if (strcmp(what, "fail") == 0)
            found = -2;
        else if (strcmp(what, "lost") == 0)
            found = -3;
        else if (strncmp(what, "delay:", 6) == 0)
            found = strtol(what + 6, NULL, 10);
    }
    fclose(file);
    return found;
}

static int synced(int fd, const char *name) {
    long wrong = fault(fd);
    if (wrong > 0)
        usleep((useconds_t)wrong * 1000);
    while (wrong == -1) {
        usleep(20 * 1000);
        wrong = fault(fd);
    }
    if (wrong == -2) {
        errno = EIO;
        return -1;
    }
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    return real(fd);
}

int fsync(int fd) { return synced(fd, "fsync"); }
int fdatasync(int fd) { return synced(fd, "fdatasync"); }

/* The page cache forgets a file: what the disk lost of it, from a sector on, reads as zeros. */
static int forgotten(int fd, off_t offset, off_t length, int advice, const char *name) {
    char link[64];
    struct stat file;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    if (advice == POSIX_FADV_DONTNEED && fault(fd) == -3 && fstat(fd, &file) == 0) {
        off_t kept = file.st_size / 2 / 512 * 512;
        int again = open(link, O_WRONLY | O_CLOEXEC);
        if (again < 0 || ftruncate(again, kept) != 0 || ftruncate(again, file.st_size) != 0)
            abort();
        close(again);
    }
    int (*real)(int, off_t, off_t, int) = (int (*)(int, off_t, off_t, int))dlsym(RTLD_NEXT, name);
    return real(fd, offset, length, advice);
}

int posix_fadvise(int fd, off_t offset, off_t length, int advice) {
    return forgotten(fd, offset, length, advice, "posix_fadvise");
}
int posix_fadvise64(int fd, off_t offset, off_t length, int advice) {
    return forgotten(fd, offset, length, advice, "posix_fadvise64");
}
