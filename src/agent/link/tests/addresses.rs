//! Who can reach whom: several addresses, two families, one side only, both at once, nobody.

use std::net::{IpAddr, Ipv6Addr, UdpSocket};

use super::*;

const IPV6: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::LOCALHOST), 0);

fn at(endpoint: &Endpoint) -> SocketAddr {
    endpoint.local_address().expect("bound")
}

fn peer_at(endpoint: &Endpoint, address: SocketAddr) -> Peer {
    Peer {
        identity: endpoint.identity().clone(),
        address: address.into(),
    }
}

/// An address where nobody answers. It is nobody's for as long as the socket lives.
fn nobody() -> (UdpSocket, SocketAddr) {
    let socket = UdpSocket::bind(ANY).expect("a port");
    let address = socket.local_addr().expect("bound");
    (socket, address)
}

async fn connect(from: &Endpoint, to: &Endpoint, addresses: &[SocketAddr]) -> bool {
    let dialled = from.dial_first(addresses, to.identity(), Purpose::Services);
    timeout(PATIENCE, dialled)
        .await
        .expect("an outcome")
        .is_ok()
}

#[tokio::test]
async fn of_several_addresses_the_one_that_answers_is_taken() {
    let authority = Authority::generate().expect("an authority");
    let (one, two) = (host(&authority, "a"), host(&authority, "b"));
    let (_silent, silent) = nobody();
    let port_0 = ANY;
    let began = std::time::Instant::now();
    assert!(connect(&one, &two, &[port_0, silent, IPV6, at(&two)]).await);
    // Nobody waits for an address that is silent to be given up.
    assert!(began.elapsed() < Duration::from_secs(3));
    assert!(!connect(&one, &two, &[port_0]).await);
    assert!(!connect(&one, &two, &[]).await);
}

#[tokio::test]
async fn hosts_of_either_family_reach_each_other() {
    let authority = Authority::generate().expect("an authority");
    let credentials = issue(&authority, Role::Host, "c");
    let Ok(six) = Endpoint::bind(&credentials, IPV6) else {
        println!("SKIPPED: this machine has no IPv6");
        return;
    };
    let four = host(&authority, "b");
    assert!(connect(&four, &six, &[at(&six)]).await);
    assert!(connect(&six, &four, &[at(&four)]).await);
    // One socket for all addresses of the machine is for both families.
    let every = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0));
    let wide = Endpoint::bind(&issue(&authority, Role::Host, "d"), every).expect("an endpoint");
    let port = at(&wide).port();
    for ip in [IpAddr::V4(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
        assert!(connect(&four, &wide, &[(ip, port).into()]).await, "{ip}");
    }
    for other in [&four, &six] {
        assert!(connect(&wide, other, &[at(other)]).await);
    }
}

#[tokio::test]
async fn whichever_of_two_hosts_can_reach_the_other_makes_the_connection() {
    let authority = Authority::generate().expect("an authority");
    let (_socket, hidden) = nobody();
    for reachable in ["a", "b"] {
        let (one, two) = (host(&authority, "a"), host(&authority, "b"));
        let place = |endpoint: &Endpoint| {
            let hides = endpoint.identity().name != name(reachable);
            peer_at(endpoint, if hides { hidden } else { at(endpoint) })
        };
        let (a, mut from_b) = Link::start(&one, vec![place(&two)]);
        let (b, mut from_a) = Link::start(&two, vec![place(&one)]);
        let session = until_up(&mut from_b, "b").await;
        until_up(&mut from_a, "a").await;
        a.send("b", &Said::Beat(1)).expect("sent");
        b.send("a", &Said::Beat(2)).expect("sent");
        assert_eq!(next_message(&mut from_a).await, Said::Beat(1));
        assert_eq!(next_message(&mut from_b).await, Said::Beat(2));
        // It stays, although the other goes on looking for one that it can make itself.
        assert_eq!(a.session("b"), Some(session), "{reachable}");
    }
}

#[tokio::test]
async fn hosts_that_dial_each_other_at_once_settle_on_one_connection() {
    let authority = Authority::generate().expect("an authority");
    for round in 0..20u64 {
        let (one, two) = (host(&authority, "a"), host(&authority, "b"));
        let at_once = Duration::ZERO;
        let (a, mut from_b) = Link::start_with(&one, vec![peer(&two)], at_once);
        let (b, mut from_a) = Link::start_with(&two, vec![peer(&one)], at_once);
        let sessions = (
            until_up(&mut from_b, "b").await,
            until_up(&mut from_a, "a").await,
        );
        // Longer than both wait for anything, in words that go there and back.
        let began = tokio::time::Instant::now();
        let mut word = round;
        while began.elapsed() < Duration::from_millis(50) || word < round + 50 {
            a.send("b", &Said::Word(word.to_string())).expect("sent");
            let heard = next_message(&mut from_a).await;
            b.send("a", &heard).expect("sent");
            assert_eq!(next_message(&mut from_b).await, heard);
            word += 1;
        }
        let now = (a.session("b"), b.session("a"));
        assert_eq!(now, (Some(sessions.0), Some(sessions.1)), "round {round}");
    }
}

#[tokio::test]
async fn a_connection_of_the_higher_name_does_not_replace_the_lower_ones() {
    let pair = pair().await;
    let [one, two] = &pair.endpoints;
    let before = pair.a.session("b");
    let second = two.dial(&peer(one), Purpose::Lanes).await;
    let second = second.expect("a connection");
    let ended = timeout(PATIENCE, second.closed()).await.expect("closed");
    assert_eq!(Ended::from(&ended), Ended::ByPeer(CloseReason::Replaced));
    assert!(before.is_some());
    assert_eq!(pair.a.session("b"), before);
}

#[tokio::test]
async fn a_peer_that_cannot_be_reached_is_said_once_with_its_address_and_the_reason() {
    let authority = Authority::generate().expect("an authority");
    let one = host(&authority, "a");
    let (_socket, silent) = nobody();
    let unreachable = Peer {
        identity: Identity::host(&name("b")),
        address: silent.into(),
    };
    let nameless = Peer {
        identity: Identity::host(&name("c")),
        address: Address("nowhere.invalid:7".to_owned()),
    };
    let (_a, mut events) = Link::<Said>::start(&one, vec![unreachable, nameless]);
    let mut said = std::collections::HashMap::new();
    while said.len() < 2 {
        let LinkEvent::Unreachable { peer, why } = next(&mut events).await else {
            panic!("nobody is there");
        };
        assert_eq!(said.insert(peer, why), None);
    }
    let of = |peer: &str| said.get(peer).expect("said");
    assert!(
        of("b").contains(&format!("does not answer at {silent}")),
        "{said:?}"
    );
    assert!(
        of("c").contains("cannot look up nowhere.invalid:7"),
        "{said:?}"
    );
}
