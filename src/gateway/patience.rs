//! How long clients are waited for that say nothing: for hours when their machines answer the
//! kernel, and not for ever when they have vanished.

use std::io;
use std::os::fd::AsFd;

use nix::sys::socket::{setsockopt, sockopt};

/// A client that says nothing for this long is asked whether it is there, in seconds.
const IDLE: u32 = 60;
/// How often it is asked then, in seconds.
const ASK_EVERY: u32 = 15;
/// After so many questions without an answer it is gone, where the kernel does not count time.
const ASK_TIMES: u32 = 4;
/// A client whose machine acknowledges nothing, neither bytes nor questions, for this long is gone,
/// in milliseconds. Nor does one last that reads nothing of what waits for it for as long. Longer
/// than the questions above take, for the sake of those who stop to think.
const UNHEARD: u32 = 300_000;

/// Has the kernel find out when a client is gone.
pub(super) fn watch_over(client: &impl AsFd) -> io::Result<()> {
    setsockopt(client, sockopt::KeepAlive, &true)?;
    setsockopt(client, sockopt::TcpKeepIdle, &IDLE)?;
    setsockopt(client, sockopt::TcpKeepInterval, &ASK_EVERY)?;
    setsockopt(client, sockopt::TcpKeepCount, &ASK_TIMES)?;
    setsockopt(client, sockopt::TcpUserTimeout, &UNHEARD)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use nix::sys::socket::getsockopt;

    use super::*;

    #[test]
    fn the_kernel_asks_clients_and_gives_them_up() {
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a port");
        let address = listener.local_addr().expect("bound");
        let client = std::net::TcpStream::connect(address).expect("a connection");
        watch_over(&client).expect("a TCP socket");
        let asks = (
            getsockopt(&client, sockopt::KeepAlive).expect("an option"),
            getsockopt(&client, sockopt::TcpKeepIdle).expect("an option"),
            getsockopt(&client, sockopt::TcpKeepInterval).expect("an option"),
            getsockopt(&client, sockopt::TcpKeepCount).expect("an option"),
            getsockopt(&client, sockopt::TcpUserTimeout).expect("an option"),
        );
        assert_eq!(asks, (true, 60, 15, 4, 300_000));
    }
}
