//! The service as its clients see it.

use super::*;
use crate::journal::recovery::DiskFailed;
use crate::journal::{MIN_SECTORS, SECTOR, Sector};
use crate::limits::MAX_BULK;

struct MemoryDisk(Vec<u8>);

impl Disk for MemoryDisk {
    fn sectors(&self) -> u64 {
        (self.0.len() / SECTOR) as u64
    }
    fn read(&mut self, from: Sector, buffer: &mut [u8]) -> Result<(), DiskFailed> {
        let start = from.0 as usize * SECTOR;
        buffer.copy_from_slice(&self.0[start..start + buffer.len()]);
        Ok(())
    }
    fn write(&mut self, to: Sector, data: &[u8]) -> Result<(), DiskFailed> {
        let start = to.0 as usize * SECTOR;
        self.0[start..start + data.len()].copy_from_slice(data);
        Ok(())
    }
}

fn service() -> Service {
    let mut disk = MemoryDisk(vec![0; MIN_SECTORS as usize * SECTOR]);
    Service::recover(&mut disk, 1 << 24, NonceSequence::new(1)).unwrap()
}

fn sendable(service: &Service, connection: &Connection) -> String {
    crate::resp::lossy(connection.sendable(service.durable()))
}

#[test]
fn a_write_is_answered_when_it_is_durable_and_reads_of_it_too() {
    let mut service = service();
    let mut writer = service.connect();
    let mut reader = service.connect();
    service.receive(&mut writer, b"GET a\r\n");
    service.serve(&mut writer);
    assert_eq!(sendable(&service, &writer), "$-1\r\n");
    writer.mark_sent(5);

    service.receive(&mut writer, b"SET a 1\r\n");
    service.serve(&mut writer);
    service.receive(&mut reader, b"GET a\r\n");
    service.serve(&mut reader);
    assert_eq!(sendable(&service, &writer), "");
    assert_eq!(
        sendable(&service, &reader),
        "",
        "it would show a write that can be lost"
    );

    assert!(service.next_commit().is_some());
    // The loop goes on while the commit is in flight.
    service.receive(&mut writer, b"INCR a\r\n");
    service.serve(&mut writer);
    assert!(service.next_commit().is_none());
    service.committed();
    assert_eq!(sendable(&service, &writer), "+OK\r\n");
    assert_eq!(sendable(&service, &reader), "$1\r\n1\r\n");
    writer.mark_sent(5);
    assert!(service.next_commit().is_some());
    service.committed();
    assert_eq!(sendable(&service, &writer), ":2\r\n");
    assert!(service.next_commit().is_none());
}

#[test]
fn a_client_that_does_not_read_is_not_served() {
    let mut service = service();
    let mut connection = service.connect();
    let value = vec![b'v'; 1000];
    let request = [b"ECHO '".as_slice(), &value, b"'\r\n"].concat();
    for _ in 0..200 {
        service.receive(&mut connection, &request);
    }
    service.serve(&mut connection);
    assert!(connection.unsent() >= OUTPUT_HIGH_WATER);
    assert!(connection.unsent() < OUTPUT_HIGH_WATER + 2000);
    assert_eq!(service.room(&connection), 0);
    let mut answered = 0;
    while connection.unsent() > 0 {
        answered += connection.unsent();
        connection.mark_sent(connection.unsent());
        service.serve(&mut connection);
    }
    assert_eq!(answered, 200 * (1000 + 9));
    assert_eq!(service.input_held, 0);
}

#[test]
fn a_protocol_error_is_told_and_ends_the_connection() {
    let mut service = service();
    let mut connection = service.connect();
    service.receive(&mut connection, b"PING\r\n*1\r\n!PING\r\nPING\r\n");
    service.serve(&mut connection);
    let told = sendable(&service, &connection);
    assert_eq!(
        told,
        "+PONG\r\n-ERR Protocol error: expected '$', got '!'\r\n"
    );
    connection.mark_sent(told.len());
    assert!(connection.finished());
}

#[test]
fn unfinished_requests_of_all_clients_are_bounded() {
    let mut service = service();
    let mut connections = Vec::new();
    let head = format!("*3\r\n$3\r\nSET\r\n$1\r\nk\r\n${MAX_BULK}\r\n");
    let part = vec![b'x'; MAX_BULK - 1];
    let mut closed = 0;
    for _ in 0..128 {
        let mut connection = service.connect();
        service.receive(&mut connection, head.as_bytes());
        service.receive(&mut connection, &part);
        service.serve(&mut connection);
        closed += usize::from(connection.session.closing);
        connections.push(connection);
    }
    assert!((40..128).contains(&closed), "{closed} closed");
    assert!(service.input_held <= INPUT_BUDGET + 128 * MAX_BULK);
    for connection in &connections {
        service.disconnect(connection);
    }
    assert_eq!((service.input_held, service.figures.connected), (0, 0));
}

#[test]
fn changes_that_wait_for_the_disk_are_bounded() {
    let mut service = service();
    let mut connection = service.connect();
    let value = vec![b'v'; 60_000];
    let request = [b"SET k '".as_slice(), &value, b"'\r\n"].concat();
    let mut durable = 0;
    for _ in 0..8 {
        service.receive(&mut connection, &request);
        service.serve(&mut connection);
    }
    assert!(service.unserved(&connection), "execution stopped");
    while service.next_commit().is_some() {
        service.committed();
        service.serve(&mut connection);
        durable += sendable(&service, &connection).matches("+OK").count();
        connection.mark_sent(connection.sendable(service.durable()).len());
    }
    assert_eq!(durable, 8);
}
