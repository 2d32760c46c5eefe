/* Disks that hang, are slow, or fail: preloaded into the processes of a test's cluster.
 *
 * The file that $UNDERSTUDY_FAULTS names has a line for each faulty folder:
 *
 *     hang FOLDER        fsync of files in it does not come back until the line is gone
 *     delay:MS FOLDER    fsync of files in it takes so long
 *     fail FOLDER        fsync of files in it fails with EIO
 *
 * It is read at every fsync: a test breaks and repairs a disk by writing it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* What is wrong with the disk of this file: 0 nothing, -1 hangs, -2 fails, else milliseconds. */
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
