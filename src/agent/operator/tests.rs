//! Tests of what operators ask and are answered.

use std::net::SocketAddr;

use super::*;
use crate::agent::certs::Name;
use crate::agent::certs::authority::Authority;
use crate::agent::journal::Incident;
use crate::config::Config;

fn lost(count: u64) -> Incident {
    Incident::LinesLost {
        count,
        reason: "x".repeat(20_000),
    }
}

struct Host {
    _folder: tempfile::TempDir,
    journal: Arc<Journal>,
    asked: mpsc::Receiver<Asked>,
    config: Config,
    authority: Authority,
}

fn host() -> Host {
    let authority = Authority::generate().expect("an authority");
    let name: Name = "a".parse().expect("a name");
    let credentials = authority.issue(&Identity::host(&name)).expect("issued");
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let endpoint = Endpoint::bind(&credentials, any).expect("an endpoint");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let journal = Journal::open(folder.path(), HostName::from(&name)).expect("a journal");
    let journal = Arc::new(journal);
    let asked = serve(&endpoint, &journal);
    let address = endpoint.local_address().expect("bound");
    let mut config = Config::new(Role::Operator, name.clone());
    config.hosts.insert(name, address.into());
    Host {
        _folder: folder,
        journal,
        asked,
        config,
        authority,
    }
}

impl Host {
    fn client(&self, role: Role) -> Client {
        let name = "someone".parse().expect("a name");
        let credentials = self.authority.issue(&Identity { role, name });
        Client::with(&self.config, &credentials.expect("issued")).expect("a client")
    }
}

fn a() -> HostName {
    HostName::new("a").expect("a name")
}

#[tokio::test]
async fn orders_reach_the_agent_and_its_answers_the_operator() {
    let mut host = host();
    let client = host.client(Role::Operator);
    let vm = VmName::new("ledger").expect("a name");
    let order = Request::Switchover { vm, to: None };
    let expected = order.clone();
    let agent = tokio::spawn(async move {
        let asked = host.asked.recv().await.expect("asked");
        assert_eq!(asked.request, expected);
        assert_eq!(asked.who.to_string(), "operator someone");
        asked
            .reply
            .send(Answer::Taken { journal: 7 })
            .expect("waits");
        let asked = host.asked.recv().await.expect("asked");
        let why = "no".to_owned();
        asked.reply.send(Answer::Refused { why }).expect("waits");
    });
    assert_eq!(client.order(&a(), &order).await.expect("taken"), 7);
    let refused = client.order(&a(), &order).await;
    assert!(matches!(refused, Err(OperatorError::Refused { why }) if why == "no"));
    agent.await.expect("asked as expected");
    // The agent is gone.
    let refused = client.status(&a()).await;
    assert!(matches!(refused, Err(OperatorError::Refused { .. })));
    let nobody = HostName::new("b").expect("a name");
    let unknown = client.status(&nobody).await.expect_err("no such host");
    assert!(unknown.to_string().contains("its hosts are a"), "{unknown}");
}

#[tokio::test]
async fn only_operators_are_heard() {
    let host = host();
    for role in [Role::Host, Role::Gateway, Role::Witness] {
        let client = host.client(role);
        let refused = client.events(&a(), 0).await;
        assert!(matches!(refused, Err(OperatorError::Refused { .. })));
        let refused = client.status(&a()).await;
        assert!(matches!(refused, Err(OperatorError::Refused { .. })));
    }
}

#[tokio::test]
async fn the_journal_is_read_and_followed() {
    let host = host();
    let client = host.client(Role::Operator);
    // More than one answer takes.
    for count in 1..=60 {
        host.journal.write(None, lost(count));
    }
    let lines = client.events(&a(), 58).await.expect("lines");
    assert_eq!(lines.len(), 2);
    let mut following = client.follow(&a(), 0).await.expect("lines");
    let mut numbers = Vec::new();
    while numbers.len() < 60 {
        let lines = following.next().await.expect("lines").expect("goes on");
        numbers.extend(lines.iter().map(|line| line.number));
    }
    assert_eq!(numbers, (1..=60).collect::<Vec<_>>());
    host.journal.write(None, lost(61));
    let lines = following.next().await.expect("lines").expect("goes on");
    assert_eq!(lines[0].what, lost(61).into());
}
