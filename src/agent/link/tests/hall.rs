//! Which connections live on the thread that heartbeats live on, and which in the hall.

use super::*;

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime")
}

/// Opens a stream that nobody serves, and waits until that is said: whoever says so has looked into our
/// certificate before.
async fn refused_stream(connection: &quinn::Connection) -> quinn::ReadToEndError {
    let (mut send, mut recv) = connection.open_bi().await.expect("a stream");
    let kind = [StreamKind::Bulk.byte()];
    send.write_all(&kind).await.expect("written");
    let answer = timeout(PATIENCE, recv.read_to_end(100)).await;
    answer
        .expect("an answer")
        .expect_err("nobody serves this kind")
}

async fn operator(authority: &Authority, target: &Peer) -> (Endpoint, quinn::Connection) {
    let ann = Endpoint::client(&issue(authority, Role::Operator, "ann")).expect("an endpoint");
    let connection = ann.dial(target, Purpose::Services).await;
    let connection = connection.expect("a connection");
    (ann, connection)
}

async fn bind_again(credentials: &Credentials, at: SocketAddr) -> Endpoint {
    let binding = async {
        loop {
            match Endpoint::bind(credentials, at) {
                Ok(endpoint) => return endpoint,
                // What had streams there has still to see that they are gone.
                Err(_) => tokio::task::yield_now().await,
            }
        }
    };
    timeout(PATIENCE, binding).await.expect("the port is free")
}

#[tokio::test]
async fn strangers_are_dealt_with_while_the_thread_of_heartbeats_does_nothing() {
    let authority = Authority::generate().expect("an authority");
    let target = host(&authority, "b");
    let place = peer(&target);
    let dialling = std::thread::spawn(move || {
        runtime().block_on(async {
            let (_ann, connection) = operator(&authority, &place).await;
            refused_stream(&connection).await
        })
    });
    // This is the thread of the target's runtime: nothing runs there until the other has ended.
    let refused = dialling.join().expect("it was let in, and refused");
    let no_service = quinn::ReadError::Reset(CloseReason::NoService.code());
    assert_eq!(refused, quinn::ReadToEndError::Read(no_service));
    let (main, _) = target.connections();
    assert_eq!(main, 0);
}

#[tokio::test]
async fn lanes_live_where_heartbeats_do_and_everybody_else_in_the_hall() {
    let authority = Authority::generate().expect("an authority");
    let (one, two) = (host(&authority, "a"), host(&authority, "b"));
    let (_a, mut from_b) = Link::<Said>::start(&one, vec![peer(&two)]);
    let (_b, mut from_a) = Link::<Said>::start(&two, vec![peer(&one)]);
    until_up(&mut from_b, "b").await;
    until_up(&mut from_a, "a").await;
    let (_ann, connection) = operator(&authority, &peer(&two)).await;
    refused_stream(&connection).await;
    assert_eq!(one.connections(), (1, 0));
    assert_eq!(two.connections(), (1, 1));
}

/// Its address is another on the way: only its certificate tells that it is a peer.
#[tokio::test]
async fn a_host_that_comes_from_an_unknown_address_is_let_in_to_the_thread_of_heartbeats() {
    let authority = Authority::generate().expect("an authority");
    let (one, two) = (host(&authority, "a"), host(&authority, "b"));
    let switch = Switch::to(two.local_address().expect("bound")).await;
    let behind = Peer {
        identity: two.identity().clone(),
        address: switch.address.into(),
    };
    let (a, mut from_b) = Link::<Said>::start(&one, vec![behind]);
    let (_b, mut from_a) = Link::<Said>::start(&two, vec![peer(&one)]);
    until_up(&mut from_b, "b").await;
    until_up(&mut from_a, "a").await;
    a.send("b", &Said::Beat(1)).expect("sent");
    assert_eq!(next_message(&mut from_a).await, Said::Beat(1));
    let (main, _) = two.connections();
    assert_eq!(main, 1);
    switch.task.abort();
}

#[tokio::test]
async fn who_is_in_the_hall_of_a_process_that_restarts_notices_at_once() {
    let authority = Authority::generate().expect("an authority");
    let credentials = issue(&authority, Role::Host, "b");
    let [old, new] = [(), ()].map(|()| Endpoint::bind(&credentials, ANY).expect("an endpoint"));
    let switch = Switch::to(old.local_address().expect("bound")).await;
    let behind = Peer {
        identity: credentials.identity.clone(),
        address: switch.address.into(),
    };
    let (_ann, connection) = operator(&authority, &behind).await;
    refused_stream(&connection).await;
    switch
        .backend
        .send_replace(new.local_address().expect("bound"));
    let (mut send, _recv) = connection.open_bi().await.expect("a stream");
    send.write_all(b"is anybody there?").await.expect("queued");
    let ended = timeout(PATIENCE, connection.closed()).await;
    assert_eq!(Ended::from(&ended.expect("noticed")), Ended::Reset);
    switch.task.abort();
}

#[tokio::test]
async fn what_is_closed_has_told_everybody_and_leaves_its_port() {
    let authority = Authority::generate().expect("an authority");
    let credentials = issue(&authority, Role::Host, "b");
    let target = Endpoint::bind(&credentials, ANY).expect("an endpoint");
    let at = target.local_address().expect("bound");
    let mut streams = target.serve(StreamKind::Operator, 1);
    let (_ann, connection) = operator(&authority, &peer(&target)).await;
    let (mut send, _recv) = connection.open_bi().await.expect("a stream");
    let kind = [StreamKind::Operator.byte()];
    send.write_all(&kind).await.expect("written");
    let mut stream = streams.recv().await.expect("a stream");
    target.close().await;
    let ended = timeout(PATIENCE, connection.closed()).await;
    assert_eq!(
        Ended::from(&ended.expect("told")),
        Ended::ByPeer(CloseReason::Done)
    );
    // Whoever serves it learns of it as well.
    let read = timeout(PATIENCE, stream.recv.read_to_end(1)).await;
    assert!(read.expect("told").is_err());
    drop((stream, target));
    bind_again(&credentials, at).await;
}

#[test]
fn the_hall_ends_with_the_runtime_of_its_endpoint() {
    let authority = Authority::generate().expect("an authority");
    let credentials = issue(&authority, Role::Host, "b");
    let home = runtime();
    let target = {
        let _inside = home.enter();
        Endpoint::bind(&credentials, ANY).expect("an endpoint")
    };
    let at = target.local_address().expect("bound");
    let abroad = runtime();
    let (_ann, connection) = abroad.block_on(async {
        let (ann, connection) = operator(&authority, &peer(&target)).await;
        refused_stream(&connection).await;
        (ann, connection)
    });
    // Nobody has closed anything.
    drop(target);
    drop(home);
    let again = runtime();
    let _inside = again.enter();
    Endpoint::bind(&credentials, at).expect("the port is free");
    drop(connection);
}
