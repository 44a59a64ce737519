"""Four hosts share the evaluations of one PostgreSQL database; one is disconnected and one dies.

Shows:
    A PostgreSQL database instead of a file. The hosts are Linux namespaces of this machine, each with a separate network, host
    name and process ids, connected by a bridge. One of them is disconnected for longer than its lease, another one loses its
    power. Every evaluation is completed once.

Run:
    As root on Linux, with a server that the bridge's network may use: listen_addresses = '*' and, in pg_hba.conf,
    "host all all 10.91.0.0/24 trust".

    $ python examples/10_four_hosts.py postgresql://postgres@10.91.0.1/postgres?namespace=four_hosts

Prints:
    ada's cable is pulled, and grace's power fails
    ada's cable is back
    all 240 completed as they should be: True
    ended well: ['ada', 'barbara', 'frances']
    evaluated by all: True
"""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable

from speval import Evaluation, load_evals, speval

COUNT, LEASE = 240, 2.0
HOSTS = ("ada", "grace", "barbara", "frances")
# Unique names, so that existing network devices are not touched.
BRIDGE = f"sp{os.getpid()}"
NAMESPACES = {host: f"speval-{os.getpid()}-{host}" for host in HOSTS}
CABLES = {host: f"{BRIDGE}to{number}" for number, host in enumerate(HOSTS)}


def work(args: dict[str, int]) -> int:
    time.sleep(0.05)
    return args["n"] ** 2


def be_a_copy(url: str) -> None:
    """Do what the script does on each of the hosts."""
    print(speval(work, [{"n": n} for n in range(COUNT)], url, lease=LEASE, progress=False), flush=True)


def ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, stderr=None if check else subprocess.DEVNULL)


def build(made: list[tuple[str, ...]]) -> None:
    """Make the network, and note what takes it away again."""
    ip("link", "add", BRIDGE, "address", "02:00:00:00:00:01", "type", "bridge")
    made.append(("link", "delete", BRIDGE))
    ip("address", "add", "10.91.0.1/24", "dev", BRIDGE)
    ip("link", "set", BRIDGE, "up")
    for number, host in enumerate(HOSTS, 11):
        ip("netns", "add", NAMESPACES[host])
        made.append(("netns", "delete", NAMESPACES[host]))
        ip("link", "add", CABLES[host], "type", "veth", "peer", "name", "eth0", "netns", NAMESPACES[host])
        ip("link", "set", CABLES[host], "master", BRIDGE, "up")
        ip("-n", NAMESPACES[host], "address", "add", f"10.91.0.{number}/24", "dev", "eth0")
        ip("-n", NAMESPACES[host], "link", "set", "eth0", "up")


def tear_down(made: list[tuple[str, ...]]) -> None:
    for command in reversed(made):
        ip(*command, check=False)


def start(host: str, url: str) -> subprocess.Popen[bytes]:
    named = f"hostname {host} && exec {sys.executable} {__file__} {url!r} copy"
    alone = ["unshare", "--uts", "--pid", "--mount-proc", "--fork", "--kill-child", "sh", "-c", named]
    return subprocess.Popen(["ip", "netns", "exec", NAMESPACES[host], *alone], start_new_session=True)


def completed(url: str) -> list[Evaluation]:
    return load_evals(url, status="completed")


def host_of(e: Evaluation) -> str:
    return (e["worker"] or "").partition(":")[0]


def main(url: str) -> None:
    copies: dict[str, subprocess.Popen[bytes]] = {}
    made: list[tuple[str, ...]] = []
    try:
        build(made)
        speval(work, [], url, progress=False)  # makes the database, so that it can be looked at at once
        copies.update((host, start(host, url)) for host in HOSTS)
        wait_until(lambda: {host_of(e) for e in completed(url)} == set(HOSTS))
        print("ada's cable is pulled, and grace's power fails")
        ip("link", "set", CABLES["ada"], "down")
        os.killpg(copies["grace"].pid, signal.SIGKILL)
        time.sleep(2 * LEASE)
        print("ada's cable is back")
        ip("link", "set", CABLES["ada"], "up")
        codes = {host: copy.wait() for host, copy in copies.items()}
        evaluations = load_evals(url)
    finally:
        for copy in copies.values():
            if copy.poll() is None:
                os.killpg(copy.pid, signal.SIGKILL)
        tear_down(made)
    shares = Counter(host_of(e) for e in evaluations)
    print(f"all {COUNT} completed as they should be:", [e["result"] for e in evaluations] == [n**2 for n in range(COUNT)])
    print("ended well:", sorted(host for host, code in codes.items() if code == 0))
    print("evaluated by all:", set(shares) == set(HOSTS))


def wait_until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.1)


if __name__ == "__main__":
    if sys.argv[2:] == ["copy"]:
        be_a_copy(sys.argv[1])
    else:
        main(sys.argv[1])
