"""Run commands where every look-up of a name is noted: in a network of its own, whose one name server is this program.

As root: `unshare --net --mount python offline.py FOLDER < commands.json`. It writes FOLDER/looked-up.json.
"""

import fcntl
import json
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

SIOCSIFFLAGS, IFF_UP = 0x8914, 1
CANARY = "canary.example"


def bring_up_loopback() -> None:
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))


def become_the_name_server(folder: Path, names: list[str]) -> None:
    """Answer every question with "no such name", and note what it was for."""
    for file, text in (
        ("resolv.conf", "nameserver 127.0.0.1\noptions timeout:1\n"),
        ("nsswitch.conf", "hosts: files dns\n"),
    ):
        (folder / file).write_text(text)
        (folder / file).chmod(0o644)
        subprocess.run(["mount", "--bind", folder / file, f"/etc/{file}"], check=True)
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("127.0.0.1", 53))

    def answer() -> None:
        while True:
            question, client = server.recvfrom(4096)
            labels, at = [], 12
            while question[at]:
                labels.append(question[at + 1 : at + 1 + question[at]].decode(errors="replace"))
                at += 1 + question[at]
            names.append(".".join(labels))
            server.sendto(question[:2] + b"\x81\x83" + question[4:6] + bytes(6) + question[12:], client)

    threading.Thread(target=answer, daemon=True).start()


def packets_without_route() -> int:
    """How often this network was asked to reach an address outside of it."""
    heads, values = [line.split() for line in Path("/proc/net/snmp").read_text().splitlines() if line.startswith("Ip:")]
    return int(values[heads.index("OutNoRoutes")])


def main() -> None:
    folder, names = Path(sys.argv[1]), []
    bring_up_loopback()
    become_the_name_server(folder, names)
    ended = [subprocess.run(command, capture_output=True, text=True) for command in json.load(sys.stdin)]
    found = {
        "names": sorted(set(names)),
        "unreachable": packets_without_route(),
        "ended": [(each.returncode, each.stdout, each.stderr) for each in ended],
    }
    # Proof that a look-up and a connection would have been seen.
    connect = "import socket\ntry: socket.create_connection((%r, 80))\nexcept OSError: pass"
    for place in (CANARY, "192.0.2.1"):
        subprocess.run([sys.executable, "-c", connect % place])
    found["canary"] = (CANARY in names, packets_without_route() > found["unreachable"])
    (folder / "looked-up.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
