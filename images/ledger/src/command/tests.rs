//! What clients are answered, word for word.

use super::*;
use crate::connection::ClientId;
use crate::keyspace::Capacity;

/// A service of one client, as a test sees it.
struct Client {
    keyspace: Keyspace,
    session: Session,
}

impl Client {
    fn new() -> Self {
        Self {
            keyspace: Keyspace::new(Capacity {
                memory: 1 << 20,
                log: 1 << 20,
            }),
            session: Session {
                id: ClientId(7),
                name: Vec::new(),
                closing: false,
            },
        }
    }

    fn raw(&mut self, request: &[&[u8]]) -> String {
        let mut output = Vec::new();
        let mut context = Context {
            keyspace: &mut self.keyspace,
            session: &mut self.session,
            figures: &Figures::default(),
            reply: Replies::new(&mut output),
        };
        execute(&mut context, request);
        lossy(&output)
    }

    fn ask(&mut self, request: &str) -> String {
        let words: Vec<&[u8]> = request.split(' ').map(str::as_bytes).collect();
        self.raw(&words)
    }
}

#[test]
fn the_table_is_in_order() {
    assert!(COMMANDS.is_sorted_by(|a, b| a.name < b.name));
    assert_eq!(find(b"GeT").map(|it| it.name), Some("get"));
    assert!(find(b"a-name-longer-than-any").is_none());
}

#[test]
fn unknown_commands_and_wrong_arities_get_redis_words() {
    let mut client = Client::new();
    assert_eq!(
        client.ask("foo a b"),
        "-ERR unknown command 'foo', with args beginning with: 'a' 'b' \r\n"
    );
    assert_eq!(
        client.ask("FOO"),
        "-ERR unknown command 'FOO', with args beginning with: \r\n"
    );
    assert_eq!(
        client.raw(&[b"f\r\noo", b"a\0b"]),
        "-ERR unknown command 'f  oo', with args beginning with: 'a' \r\n"
    );
    let long = "x".repeat(200);
    assert_eq!(
        client.ask(&format!("{long} {long} b")),
        format!(
            "-ERR unknown command '{0}', with args beginning with: '{0}' \r\n",
            &long[..128]
        )
    );
    assert_eq!(
        client.ask("GET"),
        "-ERR wrong number of arguments for 'get' command\r\n"
    );
    assert_eq!(
        client.ask("ping a b"),
        "-ERR wrong number of arguments for 'ping' command\r\n"
    );
    assert_eq!(
        client.ask("mset a b c"),
        "-ERR wrong number of arguments for 'mset' command\r\n"
    );
    assert_eq!(
        client.ask("client setname"),
        "-ERR wrong number of arguments for 'client|setname' command\r\n"
    );
    assert_eq!(
        client.ask("client kill x"),
        "-ERR unknown subcommand 'kill'. Try CLIENT HELP.\r\n"
    );
}

#[test]
fn values_are_set_and_read() {
    let mut client = Client::new();
    assert_eq!(client.ask("get a"), "$-1\r\n");
    assert_eq!(client.ask("set a 1"), "+OK\r\n");
    assert_eq!(client.ask("set a 2 NX"), "$-1\r\n");
    assert_eq!(client.ask("set a 2 xx get"), "$1\r\n1\r\n");
    assert_eq!(client.ask("set b 2 XX"), "$-1\r\n");
    assert_eq!(client.ask("set b 2 get"), "$-1\r\n");
    assert_eq!(client.ask("set a 2 ex 10"), "-ERR syntax error\r\n");
    assert_eq!(client.ask("set a 2 nx xx"), "-ERR syntax error\r\n");
    assert_eq!(client.ask("mset c 3 d 4"), "+OK\r\n");
    assert_eq!(
        client.ask("mget a b x d"),
        "*4\r\n$1\r\n2\r\n$1\r\n2\r\n$-1\r\n$1\r\n4\r\n"
    );
    assert_eq!(client.ask("msetnx e 1 a 1"), ":0\r\n");
    assert_eq!(client.ask("exists a a e"), ":2\r\n");
    assert_eq!(client.ask("append a xyz"), ":4\r\n");
    assert_eq!(client.ask("strlen a"), ":4\r\n");
    assert_eq!(client.ask("getset a q"), "$4\r\n2xyz\r\n");
    assert_eq!(client.ask("getdel a"), "$1\r\nq\r\n");
    assert_eq!(client.ask("setnx a 1"), ":1\r\n");
    assert_eq!(client.ask("del a b nothing"), ":2\r\n");
    assert_eq!(client.ask("dbsize"), ":2\r\n");
    assert_eq!(client.ask("type c"), "+string\r\n");
    assert_eq!(client.ask("keys ?"), "*2\r\n$1\r\nc\r\n$1\r\nd\r\n");
    assert_eq!(client.ask("flushall"), "+OK\r\n");
    assert_eq!(client.ask("dbsize"), ":0\r\n");
}

#[test]
fn counting_keeps_to_sixty_four_bits() {
    let mut client = Client::new();
    assert_eq!(client.ask("incr n"), ":1\r\n");
    assert_eq!(client.ask("incrby n 41"), ":42\r\n");
    assert_eq!(client.ask("decrby n 43"), ":-1\r\n");
    assert_eq!(client.ask("decr n"), ":-2\r\n");
    client.ask("set n 9223372036854775807");
    assert_eq!(
        client.ask("incr n"),
        "-ERR increment or decrement would overflow\r\n"
    );
    assert_eq!(
        client.ask("decrby n -9223372036854775808"),
        "-ERR decrement would overflow\r\n"
    );
    let not_a_number = "-ERR value is not an integer or out of range\r\n";
    assert_eq!(client.ask("incrby n 1.5"), not_a_number);
    client.ask("set n x");
    assert_eq!(client.ask("incr n"), not_a_number);
    assert_eq!(client.ask("get n"), "$1\r\nx\r\n");
}

#[test]
fn full_is_an_error_and_reads_go_on() {
    let mut client = Client::new();
    let value = vec![b'v'; 100_000];
    let mut refused = String::new();
    for index in 0..20 {
        let key = format!("k{index}");
        refused = client.raw(&[b"SET", key.as_bytes(), &value]);
    }
    assert_eq!(
        refused,
        "-OOM command not allowed when used memory > 'maxmemory'.\r\n"
    );
    let keys = client.ask("dbsize");
    assert_eq!(
        client.raw(&[b"MSET", b"x", b"", b"y", &value]),
        "-OOM command not allowed when used memory > 'maxmemory'.\r\n"
    );
    assert_eq!(client.ask("dbsize"), keys);
    assert!(client.ask("get k0").starts_with("$100000\r\n"));
    assert_eq!(client.ask("del k0"), ":1\r\n");
    assert_eq!(client.raw(&[b"SET", b"k0", &value]), "+OK\r\n");
}

#[test]
fn clients_are_greeted() {
    let mut client = Client::new();
    assert_eq!(
        client.ask("hello 3"),
        "-NOPROTO unsupported protocol version\r\n"
    );
    assert!(client.ask("hello 2 setname me").contains("redis"));
    assert_eq!(client.ask("client getname"), "$2\r\nme\r\n");
    assert_eq!(client.ask("client id"), ":7\r\n");
    assert_eq!(client.ask("client setinfo lib-name x"), "+OK\r\n");
    assert_eq!(client.ask("select 0"), "+OK\r\n");
    assert_eq!(client.ask("select 1"), "-ERR DB index is out of range\r\n");
    assert_eq!(
        client.ask("config get save"),
        "*2\r\n$4\r\nsave\r\n$0\r\n\r\n"
    );
    assert_eq!(
        client.ask("CONFIG GET APPENDONLY"),
        "*2\r\n$10\r\nappendonly\r\n$3\r\nyes\r\n"
    );
    assert_eq!(client.ask("command docs"), "*0\r\n");
    assert_eq!(
        client.ask("command count"),
        format!(":{}\r\n", COMMANDS.len())
    );
    assert!(client.ask("info").contains("redis_version:"));
    assert!(!client.ask("info memory").contains("redis_version:"));
    assert_eq!(client.ask("quit"), "+OK\r\n");
    assert!(client.session.closing);
}

#[test]
fn patterns_are_redis_globs() {
    for (pattern, text, wanted) in [
        ("*", "", true),
        ("h?llo", "hello", true),
        ("h*llo", "heeello", true),
        ("h*l", "hello", false),
        ("*a*b*c", "xxaxxbxxc", true),
        ("h[ae]llo", "hallo", true),
        ("h[^e]llo", "hello", false),
        ("h[a-c]llo", "hbllo", true),
        ("h[c-a]llo", "hbllo", true),
        ("h\\?llo", "h?llo", true),
        ("h\\?llo", "hello", false),
        ("", "a", false),
        ("[", "a", false),
        ("a[b", "ab", true),
    ] {
        assert_eq!(
            glob(pattern.as_bytes(), text.as_bytes()),
            wanted,
            "{pattern} {text}"
        );
    }
}
