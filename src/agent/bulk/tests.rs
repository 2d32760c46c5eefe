use std::net::SocketAddr;
use std::sync::Mutex;

use super::*;
use crate::agent::certs::authority::Authority;
use crate::agent::link::lock;

fn any_port() -> SocketAddr {
    ([127, 0, 0, 1], 0).into()
}

fn endpoint(authority: &Authority, name: &str) -> Endpoint {
    let name = name.parse().expect("a name");
    let credentials = authority.issue(&Identity::host(&name)).expect("issued");
    Endpoint::bind(&credentials, any_port()).expect("an endpoint")
}

/// Data, a hole longer than a chunk, data that ends within a chunk, a hole at the end.
fn contents() -> Vec<u8> {
    let mut contents = vec![0; 5 * CHUNK + 512];
    contents[..700].fill(7);
    for (index, byte) in contents[3 * CHUNK - 100..4 * CHUNK].iter_mut().enumerate() {
        *byte = (index * index) as u8;
    }
    contents
}

fn served() -> (tempfile::TempDir, Endpoint, Endpoint, Peer, DiskBase) {
    let authority = Authority::generate().expect("an authority");
    let (one, two) = (endpoint(&authority, "a"), endpoint(&authority, "b"));
    let folder = tempfile::tempdir().expect("a temporary folder");
    let base = Base::seal(folder.path(), &mut &contents()[..]).expect("sealed");
    let serving = two.clone();
    let bases = folder.path().to_owned();
    tokio::spawn(async move { serve_bases(&serving, bases).await });
    let peer = Peer {
        identity: two.identity().clone(),
        address: two.local_address().expect("bound").into(),
    };
    (folder, one, two, peer, base.name())
}

#[tokio::test]
async fn a_base_comes_over_with_its_holes_and_is_checked() {
    let (_there, one, _two, peer, name) = served();
    let here = tempfile::tempdir().expect("a temporary folder");
    let come = Mutex::new(Vec::new());
    let note = |bytes| lock(&come).push(bytes);
    fetch_base(&one, &peer, name, here.path(), &note)
        .await
        .expect("fetched");
    assert_eq!(*lock(&come), [0, 0, 2 * CHUNK as u64, 3 * CHUNK as u64]);
    let got = fs::read(Base::path(here.path(), name)).expect("there");
    assert_eq!(got, contents());
}

#[tokio::test]
async fn what_is_missing_or_damaged_is_not_taken() {
    let (there, one, _two, peer, name) = served();
    let here = tempfile::tempdir().expect("a temporary folder");
    let other = DiskBase {
        digest: [9; 32],
        ..name
    };
    let missing = fetch_base(&one, &peer, other, here.path(), &|_| {}).await;
    assert!(matches!(missing, Err(FetchError::Missing { .. })));
    let path = Base::path(there.path(), name);
    let mut damaged = contents();
    damaged[3] ^= 1;
    fs::remove_file(&path).expect("removed");
    fs::write(&path, damaged).expect("written");
    let wrong = fetch_base(&one, &peer, name, here.path(), &|_| {}).await;
    assert!(matches!(wrong, Err(FetchError::Wrong { .. })), "{wrong:?}");
    // Longer than it says.
    fs::write(&path, vec![1; contents().len() + CHUNK]).expect("written");
    let long = fetch_base(&one, &peer, name, here.path(), &|_| {}).await;
    assert!(matches!(long, Err(FetchError::Wrong { .. })), "{long:?}");
    assert_eq!(fs::read_dir(here.path()).expect("listed").count(), 0);
}

fn partial(folder: &Path, name: DiskBase) -> PathBuf {
    Base::path(folder, name).with_extension("partial")
}

/// The peer's own beginning is damaged by now: it is not sent again.
#[tokio::test]
async fn a_transfer_goes_on_where_the_last_one_ended() {
    let (there, one, _two, peer, name) = served();
    let here = tempfile::tempdir().expect("a temporary folder");
    let mut damaged = contents();
    damaged[3] ^= 1;
    fs::write(Base::path(there.path(), name), damaged).expect("written");
    let first = &contents()[..3 * CHUNK + 77];
    fs::write(partial(here.path(), name), first).expect("written");
    let fetched = fetch_base(&one, &peer, name, here.path(), &|_| {}).await;
    fetched.expect("fetched");
    let got = fs::read(Base::path(here.path(), name)).expect("there");
    assert_eq!(got, contents());
    assert_eq!(fs::read_dir(here.path()).expect("listed").count(), 1);
}

#[tokio::test]
async fn what_is_here_and_damaged_is_fetched_again() {
    let (_there, one, _two, peer, name) = served();
    let here = tempfile::tempdir().expect("a temporary folder");
    fs::write(partial(here.path(), name), vec![1; CHUNK]).expect("written");
    let fetched = fetch_base(&one, &peer, name, here.path(), &|_| {}).await;
    fetched.expect("fetched");
    let got = fs::read(Base::path(here.path(), name)).expect("there");
    assert_eq!(got, contents());
}

/// A peer that gives up half way, and one that says nothing.
#[tokio::test]
async fn what_has_come_stays_and_nobody_waits_for_ever() {
    let authority = Authority::generate().expect("an authority");
    let (one, two) = (endpoint(&authority, "a"), endpoint(&authority, "b"));
    let peer = Peer {
        identity: two.identity().clone(),
        address: two.local_address().expect("bound").into(),
    };
    let name = DiskBase {
        digest: [9; 32],
        size: 3 * CHUNK as u64,
    };
    let streams = two.serve(StreamKind::Bulk, 8);
    let answers = |_: Identity, question: Question, mut reply: Reply| async move {
        let Question::Base { from, .. } = question;
        if from > 0 {
            return std::future::pending().await;
        }
        let chunk = Part::Chunk {
            offset: 0,
            compressed: zstd::bulk::compress(&vec![1; CHUNK], LEVEL).expect("compressed"),
        };
        let reason = "it is tired".to_owned();
        for part in [chunk, Part::Failed { reason }] {
            reply.send(&part).await.expect("sent");
        }
    };
    tokio::spawn(serve_requests(streams, answers));
    let here = tempfile::tempdir().expect("a temporary folder");
    let fetched = fetch_base(&one, &peer, name, here.path(), &|_| {}).await;
    assert!(
        matches!(fetched, Err(FetchError::Failed { .. })),
        "{fetched:?}"
    );
    let kept = fs::metadata(partial(here.path(), name))
        .expect("kept")
        .len();
    assert_eq!(kept, CHUNK as u64);
    let soon = Duration::from_millis(20);
    let fetched = fetch_rest(&one, &peer, name, here.path(), &|_| {}, soon).await;
    assert!(
        matches!(fetched, Err(FetchError::Stalled { .. })),
        "{fetched:?}"
    );
    let kept = fs::metadata(partial(here.path(), name))
        .expect("kept")
        .len();
    assert_eq!(kept, CHUNK as u64);
}

/// A hole is told of, or whoever waits would give up.
#[test]
fn a_long_hole_is_no_silence() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("hole");
    let file = fs::File::create(&path).expect("a file");
    file.set_len(2 * HOLE + 512).expect("a hole");
    let (parts, mut sent) = mpsc::channel(8);
    read_chunks(&path, 0, &parts).expect("read");
    drop(parts);
    let mut all = Vec::new();
    while let Ok((_, part)) = sent.try_recv() {
        all.push(part);
    }
    let zeros = |through| Part::Zeros { through };
    assert_eq!(all, [zeros(HOLE), zeros(2 * HOLE)]);
}
