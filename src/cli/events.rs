//! `events`: what each host decided and why, from the journals of all hosts in the order of time.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use super::failure::{Failure, OrExit as _};
use super::operator::{ClusterArgs, known_host};
use super::{block_on, output, suggest};
use crate::agent::journal::Line;
use crate::agent::operator::{Client, OperatorError};
use crate::protocol::{HostName, VmName};
use crate::sentence::sentence;

/// Between two attempts to follow a host that cannot be heard.
const ASK_AGAIN: Duration = Duration::from_millis(500);

/// What `events` is told.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    cluster: ClusterArgs,
    /// Only of these hosts
    #[arg(long = "host", value_name = "HOST")]
    hosts: Vec<HostName>,
    /// Only about this VM
    #[arg(long, value_name = "VM")]
    vm: Option<VmName>,
    /// Go on with what is decided from now on, until Ctrl-C
    #[arg(long)]
    follow: bool,
    /// Print JSON, an event a line, with reason codes
    #[arg(long)]
    json: bool,
}

/// Does it.
pub fn run(args: &Args) -> Result<(), Failure> {
    block_on(async {
        let client = args.cluster.client()?;
        let hosts = chosen(&client, &args.hosts)?;
        let mut known = Vec::new();
        let mut lines = Vec::new();
        let mut failed = None;
        for host in hosts {
            match all_events(&client, &host).await {
                Ok(found) => {
                    known.push((host, found.last().map_or(0, |line| line.number)));
                    lines.extend(found);
                }
                Err(error) => {
                    eprintln!("understudy: host {host}: {}", sentence(&error));
                    failed = Some(error);
                }
            }
        }
        if let (true, Some(error)) = (known.is_empty(), failed) {
            return Err(error).or_fail();
        }
        lines.sort_by_key(|line| (timestamp(line), line.clock));
        if let (Some(vm), false) = (&args.vm, args.follow) {
            known_to(vm, &lines)?;
        }
        for line in lines {
            print(args, &line)?;
        }
        if args.follow {
            follow(args, client, known).await?;
        }
        Ok(())
    })
}

/// Fails when no line is about this VM: its name is misspelt, or nobody has ever heard of it.
fn known_to(vm: &VmName, lines: &[Line]) -> Result<(), Failure> {
    let mut names: Vec<_> = lines.iter().filter_map(|line| line.vm.as_ref()).collect();
    if names.contains(&vm) {
        return Ok(());
    }
    names.sort();
    names.dedup();
    Err(suggest::unknown("VM", vm.as_str(), names)).or_fail()
}

fn chosen(client: &Client, wanted: &[HostName]) -> Result<Vec<HostName>, Failure> {
    if wanted.is_empty() {
        Ok(client.hosts().cloned().collect())
    } else {
        wanted.iter().map(|host| known_host(client, host)).collect()
    }
}

/// All lines that a host keeps.
pub async fn all_events(client: &Client, host: &HostName) -> Result<Vec<Line>, OperatorError> {
    events_after(client, host, 0).await
}

/// The lines of a host after a number.
pub async fn events_after(
    client: &Client,
    host: &HostName,
    after: u64,
) -> Result<Vec<Line>, OperatorError> {
    let (mut lines, mut after) = (Vec::new(), after);
    loop {
        let more = client.events(host, after).await?;
        let Some(last) = more.last() else {
            return Ok(lines);
        };
        after = last.number;
        lines.extend(more);
    }
}

/// What comes from a host that is followed.
type Told = Result<Vec<Line>, OperatorError>;

async fn follow(args: &Args, client: Client, known: Vec<(HostName, u64)>) -> Result<(), Failure> {
    // As many as a terminal could show meanwhile; then the hosts wait.
    let (send, mut received) = mpsc::channel(64);
    let client = Arc::new(client);
    for (host, after) in known {
        let (client, send) = (Arc::clone(&client), send.clone());
        tokio::spawn(async move { follow_one(&client, &host, after, &send).await });
    }
    drop(send);
    while let Some((host, told)) = received.recv().await {
        match told {
            Ok(lines) => lines.iter().try_for_each(|line| print(args, line))?,
            Err(error) => eprintln!(
                "understudy: host {host}: {}; it is asked again until it answers",
                sentence(&error)
            ),
        }
    }
    Ok(())
}

/// Hands on a host's lines as they are written, until nobody wants them. A host that cannot be heard for a
/// while is told of once and asked again: one that restarts is the very thing that is followed for.
async fn follow_one(
    client: &Client,
    host: &HostName,
    mut after: u64,
    to: &mpsc::Sender<(HostName, Told)>,
) {
    let mut told = false;
    loop {
        let failed = match client.follow(host, after).await {
            Ok(mut lines) => loop {
                match lines.next().await {
                    Ok(Some(lines)) => {
                        told = false;
                        after = lines.last().map_or(after, |line| line.number);
                        if to.send((host.clone(), Ok(lines))).await.is_err() {
                            return;
                        }
                    }
                    // It has ended in order.
                    Ok(None) => break None,
                    Err(error) => break Some(error),
                }
            },
            Err(error) => Some(error),
        };
        if let Some(error) = failed.filter(|_| !told) {
            told = true;
            if to.send((host.clone(), Err(error))).await.is_err() {
                return;
            }
        }
        tokio::select! {
            () = tokio::time::sleep(ASK_AGAIN) => {}
            () = to.closed() => return,
        }
    }
}

fn timestamp(line: &Line) -> Option<jiff::Timestamp> {
    line.at.parse().ok()
}

fn print(args: &Args, line: &Line) -> Result<(), Failure> {
    if args.vm.is_some() && args.vm != line.vm {
        return Ok(());
    }
    if args.json {
        return output::json_line(line);
    }
    let at = timestamp(line).map_or_else(
        || line.at.clone(),
        |at| at.strftime("%F %H:%M:%S%.3f").to_string(),
    );
    let vm = line
        .vm
        .as_ref()
        .map_or(String::new(), |vm| format!("{vm}: "));
    output::line(format_args!(
        "{at}  {:<10} {vm}{}",
        line.host.as_str(),
        line.text
    ))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::Event;

    #[test]
    fn a_vm_that_no_line_is_about_is_answered_with_the_closest() {
        let vm = |name: &str| VmName::new(name).expect("a name");
        let line = |about: Option<&str>| Line {
            number: 1,
            at: String::new(),
            clock: 0,
            host: HostName::new("a").expect("a name"),
            vm: about.map(vm),
            text: String::new(),
            what: Event::StoreRoom.into(),
        };
        let lines = [line(None), line(Some("shop"))];
        assert!(known_to(&vm("shop"), &lines).is_ok());
        let error = known_to(&vm("shpo"), &lines).expect_err("misspelt");
        assert_eq!(
            error.to_string(),
            "there is no VM 'shpo': did you mean 'shop'?"
        );
    }
}
