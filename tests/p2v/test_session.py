"""SSH sessions against a real sshd: host keys, logins, root, commands, and links that break."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from formats.errors import UsageError
from p2v.config import Secret
from p2v.errors import AuthenticationError, CommandError, HostError, HostKeyError, LinkLostError, PrivilegeError
from p2v.session import Session, SshTarget
from p2v.session.target import resolve
from tests.p2v.proxy import proxy
from tests.p2v.sshd import FREE, PLAIN, SUDOER, SshServer, User, ssh_server
from tests.requirement import needs, needs_root

WRONG = "wr0ng-" + "0ne"  # in two, so that no traceback shows it as source text


@pytest.fixture(scope="module")
def session(sshd: SshServer) -> Iterator[Session]:
    with Session.connect(sshd.target()) as made:
        yield made


class TestTarget:
    @pytest.mark.parametrize(
        ("text", "user", "host", "port"),
        [
            ("root@web", "root", "web", None),
            ("web", None, "web", None),
            ("ssh://admin@web.example:2222", "admin", "web.example", 2222),
            ("ssh://root@[2001:db8::1]:22", "root", "2001:db8::1", 22),
            ("root@2001:db8::1", "root", "2001:db8::1", None),
            ("EXAMPLE\\admin@web", "EXAMPLE\\admin", "web", None),
        ],
    )
    def test_parse(self, text: str, user: str | None, host: str, port: int | None) -> None:
        target = SshTarget.parse(text)
        assert (target.user, target.host, target.port) == (user, host, port)

    @pytest.mark.parametrize(
        "text",
        ["", "a b", "root@", "root@-oX=y", "-x@web", "root@web;id", "ssh://root@web/path", "http://web", "ssh://web:0", "ssh://web:99999"],
    )  # fmt: skip
    def test_nonsense_is_refused(self, text: str) -> None:
        with pytest.raises(UsageError):
            SshTarget.parse(text)

    def test_a_port_in_the_wrong_place_says_how_to_write_it(self) -> None:
        with pytest.raises(UsageError) as caught:
            SshTarget.parse("root@web:2222")
        assert "ssh://root@web:2222" in caught.value.advice

    def test_a_password_on_the_command_line_is_refused_and_not_repeated(self) -> None:
        with pytest.raises(UsageError) as caught:
            SshTarget.parse("ssh://root:hunter2@web")
        assert "hunter2" not in str(caught.value) + caught.value.advice

    def test_the_ssh_configuration_names_host_port_user_and_keys(self, tmp_path: Path) -> None:
        config = tmp_path / "config"
        config.write_text(
            "Host web\n HostName 10.1.2.3\n Port 2200\n User admin\n IdentityFile /k/one\n UserKnownHostsFile /k/known\n"
            " HostKeyAlias web-key\n ProxyJump op@gate:2022\nHost gate\n HostName gate.example\n"
        )
        found = resolve(SshTarget(host="web", config=config, password=Secret("x")))
        assert (found.host, found.port, found.user, found.key_name) == ("10.1.2.3", 2200, "admin", "web-key")
        assert found.identities == (Path("/k/one"),)
        assert found.known_hosts[0] == Path("/k/known")
        assert [(jump.user, jump.host, jump.port) for jump in found.jumps] == [("op", "gate.example", 2022)]
        assert found.jumps[0].password is None

    def test_what_the_user_says_wins_over_the_configuration(self, tmp_path: Path) -> None:
        config = tmp_path / "config"
        config.write_text("Host web\n Port 2200\n User admin\n IdentityFile /k/one\n")
        found = resolve(SshTarget(host="web", user="root", port=22, identity=Path("/mine"), config=config))
        assert (found.port, found.user, found.identities) == (22, "root", (Path("/mine"),))


class TestRun:
    def test_streams_and_exit_code(self, session: Session) -> None:
        result = session.run("cat; echo oops >&2; exit 7", input=b"in\0put")
        assert (result.exit_code, result.stdout, result.error_text) == (7, b"in\0put", "oops")

    def test_a_sequence_is_quoted(self, session: Session) -> None:
        words = ["printf", "%s|", "a b", "$HOME", "it's", "a\nb", '"']
        assert session.run(words).stdout == b"a b|$HOME|it's|a\nb|\"|"

    def test_locale_and_path_are_fixed(self, session: Session) -> None:
        result = session.run("echo $LC_ALL; command -v sshd")
        assert result.text.split()[0] == "C"
        assert result.text.split()[1].endswith("/sshd")

    def test_much_goes_both_ways_at_once(self, session: Session) -> None:
        content = bytes(range(256)) * (40 << 10)  # more than any window
        assert session.run("tee /dev/stderr", input=content).stdout == content

    def test_standard_error_keeps_its_end(self, session: Session) -> None:
        result = session.run("yes 0123456789abcde | head -c 3000000 >&2; echo last >&2")
        assert result.stderr.endswith(b"last\n")
        assert len(result.stderr) < 1 << 20

    def test_check_says_what_the_command_said(self, session: Session) -> None:
        with pytest.raises(CommandError, match=r"exit code 3.*no such thing"):
            session.run("echo no such thing >&2; exit 3", check=True)

    def test_a_signal_is_minus_one(self, session: Session) -> None:
        assert session.run("kill -9 $$").exit_code == -1

    def test_output_is_bounded(self, session: Session) -> None:
        with pytest.raises(CommandError, match="more than"):
            session.run("cat /dev/zero", limit=1 << 20)

    def test_a_command_that_does_not_end_is_ended(self, session: Session, tmp_path: Path) -> None:
        mark = tmp_path / "pid"
        with pytest.raises(CommandError, match="did not end"):
            session.run(f"echo $$ >{mark}; exec sleep 600", timeout=1)
        pid = mark.read_text().strip()
        for _ in range(100):
            if session.run(["kill", "-0", pid]).exit_code != 0:
                return
            session.run("sleep 0.1")
        pytest.fail("the command still runs")

    def test_many_at_once(self, session: Session) -> None:
        seen: list[int] = []

        def ask(number: int) -> None:
            seen.append(int(session.run(f"sleep 0.1; echo {number}").stdout))

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(seen) == list(range(24))

    def test_a_process_is_talked_to(self, session: Session) -> None:
        process = session.start("while read line; do echo got $line; done; exit 4", lane=1)
        process.write(b"one\n")
        assert process.read(100) == b"got one\n"
        process.close_input()
        assert process.read(100) == b""
        assert process.wait(10) == 4

    def test_a_process_that_is_gone_says_so_when_it_is_written_to(self, session: Session) -> None:
        process = session.start("echo bye >&2; exit 1")
        process.wait(10)
        with pytest.raises(CommandError, match="bye"):
            process.write(bytes(8 << 20))

    def test_closed_is_closed(self, sshd: SshServer) -> None:
        made = Session.connect(sshd.target())
        made.close()
        made.close()
        with pytest.raises(HostError):
            made.run("true")


class TestHostKey:
    def test_an_unknown_key_is_refused_with_the_command_that_adds_it(self, sshd: SshServer, tmp_path: Path) -> None:
        known = tmp_path / "known hosts"
        with pytest.raises(HostKeyError) as caught:
            Session.connect(sshd.target(known_hosts=known))
        shown = subprocess.run(
            ["ssh-keygen", "-lf", sshd.folder / "host_key.pub"], capture_output=True, text=True, check=True
        )
        assert shown.stdout.split()[1] in str(caught.value)
        assert not known.exists()
        command = caught.value.advice[caught.value.advice.index("ssh-keyscan") :]
        subprocess.run(["sh", "-c", command], check=True, capture_output=True)
        Session.connect(sshd.target(known_hosts=known)).close()

    def test_a_changed_key_is_refused(self, sshd: SshServer, tmp_path: Path) -> None:
        blob = (sshd.identity.with_suffix(".pub")).read_text().split()[1]
        known = tmp_path / "known"
        known.write_text(f"[127.0.0.1]:{sshd.port} ssh-ed25519 {blob}\n")
        with pytest.raises(HostKeyError, match="CHANGED") as caught:
            Session.connect(sshd.target(known_hosts=known))
        command = caught.value.advice[caught.value.advice.index("ssh-keygen -R") :]
        subprocess.run(["sh", "-c", command], check=True, capture_output=True)
        Session.connect(sshd.target(known_hosts=known)).close()

    def test_a_hashed_file_is_understood(self, sshd: SshServer, tmp_path: Path) -> None:
        known = tmp_path / "known"
        shutil.copy(sshd.known_hosts, known)
        subprocess.run(["ssh-keygen", "-q", "-H", "-f", known], check=True, capture_output=True)
        assert known.read_text().startswith("|1|")
        Session.connect(sshd.target(known_hosts=known)).close()

    def test_the_key_of_another_port_does_not_count(self, sshd: SshServer, tmp_path: Path) -> None:
        known = tmp_path / "known"
        known.write_text(sshd.known_hosts.read_text().replace(f"[127.0.0.1]:{sshd.port}", "127.0.0.1"))
        with pytest.raises(HostKeyError):
            Session.connect(sshd.target(known_hosts=known))

    def test_a_revoked_key_is_refused_although_it_is_listed(self, sshd: SshServer, tmp_path: Path) -> None:
        known = tmp_path / "known"
        known.write_text(sshd.known_hosts.read_text() + "@revoked * " + sshd.known_hosts.read_text().split(None, 1)[1])
        with pytest.raises(HostKeyError, match="revoked"):
            Session.connect(sshd.target(known_hosts=known))


class TestLogin:
    @needs_root()
    def test_password(self, sshd: SshServer) -> None:
        target = sshd.target(PLAIN.name, key=False, password=sshd.password(PLAIN.name))
        with Session.connect(target) as made:
            assert made.run("id -un").text.strip() == PLAIN.name

    @needs_root()
    def test_a_wrong_password_says_what_was_tried_and_not_the_password(self, sshd: SshServer) -> None:
        with pytest.raises(AuthenticationError, match="password: refused") as caught:
            Session.connect(sshd.target(PLAIN.name, key=False, password=Secret(WRONG)))
        assert WRONG not in "".join(traceback.format_exception(caught.value)) + caught.value.advice
        assert WRONG not in repr(sshd.target(password=Secret(WRONG)))

    def test_a_key_that_is_not_taken(self, sshd: SshServer, tmp_path: Path) -> None:
        other = tmp_path / "other"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other], check=True)
        with pytest.raises(AuthenticationError, match=r"key .*other: refused") as caught:
            Session.connect(sshd.target(identity=other))
        assert "--identity" in caught.value.advice

    @pytest.mark.parametrize("passphrase", ["secret", None])
    def test_a_key_that_cannot_be_used(self, sshd: SshServer, tmp_path: Path, passphrase: str | None) -> None:
        other = tmp_path / "other"
        if passphrase is None:
            other.write_text("no key")
        else:
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-f", other], check=True)
        with pytest.raises(AuthenticationError, match="passphrase" if passphrase else "cannot be read"):
            Session.connect(sshd.target(identity=other))

    @needs("ssh-agent", "ssh-add")
    def test_the_agents_keys(self, sshd: SshServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        agent = subprocess.Popen(["ssh-agent", "-D", "-a", tmp_path / "agent"], stdout=subprocess.DEVNULL)
        try:
            monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "agent"))
            add: list[str] = [
                "sh",
                "-c",
                'i=0; until ssh-add -q "$1"; do i=$((i+1)); [ $i -lt 50 ] || exit 1; sleep 0.1; done',
                "sh",
                str(sshd.identity),
            ]
            subprocess.run(add, check=True, capture_output=True)
            Session.connect(sshd.target(key=False)).close()
        finally:
            agent.terminate()
            agent.wait(10)

    def test_through_a_jump_host(self, sshd: SshServer, tmp_path: Path) -> None:
        config = tmp_path / "config"
        target = sshd.target()
        config.write_text(
            f"Host far\n HostName 127.0.0.1\n Port {sshd.port}\n ProxyJump gate\nHost gate\n HostName 127.0.0.1\n Port {sshd.port}\n"
        )
        via = SshTarget(
            host="far", user=target.user, identity=target.identity, known_hosts=target.known_hosts, config=config
        )
        with Session.connect(via) as made:
            assert made.run("echo here").text == "here\n"


@needs_root()
@needs("sudo")
class TestRoot:
    def test_root_is_root_already(self, session: Session) -> None:
        assert session.run("id -u", root=True).text.strip() == "0"

    def test_sudo_without_a_password(self, sshd: SshServer) -> None:
        with Session.connect(sshd.target(FREE.name)) as made:
            assert made.run("id -u; cat", root=True, input=b"x").stdout == b"0\nx"

    def test_sudo_with_a_password_on_standard_input(self, sshd: SshServer) -> None:
        password = sshd.password(SUDOER.name)
        with Session.connect(sshd.target(SUDOER.name, sudo_password=password)) as made:
            for _ in range(2):
                assert made.run("id -u; cat", root=True, input=b"x").stdout == b"0\nx"
            shown = made.run("cat /proc/[0-9]*/cmdline | tr '\\0' ' '", root=True).text
            assert "sudo -S" in shown
            assert password.reveal() not in shown

    def test_a_wrong_sudo_password(self, sshd: SshServer) -> None:
        with (
            Session.connect(sshd.target(SUDOER.name, sudo_password=Secret(WRONG))) as made,
            pytest.raises(PrivilegeError) as caught,
        ):
            made.run("id -u", root=True)
        assert WRONG not in "".join(traceback.format_exception(caught.value)) + caught.value.advice

    @pytest.mark.parametrize("user", [PLAIN, SUDOER], ids=["no rule", "no password given"])
    def test_no_way_to_root_gives_the_sudoers_line(self, sshd: SshServer, user: User) -> None:
        with Session.connect(sshd.target(user.name)) as made, pytest.raises(PrivilegeError) as caught:
            made.run("id -u", root=True)
        assert f"{user.name} ALL=(ALL) NOPASSWD: ALL" in caught.value.advice


class TestUnreachable:
    def test_refused(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            with pytest.raises(HostError, match="refuses connections") as caught:
                Session.connect(SshTarget(host="127.0.0.1", port=probe.getsockname()[1], config=None))
        assert "sshd" in caught.value.advice

    def test_an_unknown_name(self) -> None:
        with pytest.raises(HostError, match="is not known"):
            Session.connect(SshTarget(host="no-such-host.invalid", config=None))

    def test_a_port_that_speaks_something_else(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:

            def serve() -> None:
                peer, _ = server.accept()
                with peer:
                    peer.sendall(b"220 mail.example ESMTP\r\n" * 200)

            threading.Thread(target=serve, daemon=True).start()
            with pytest.raises(HostError, match="no SSH session"):
                Session.connect(SshTarget(host="127.0.0.1", port=server.getsockname()[1], config=None))

    def test_a_port_that_says_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("p2v.session.login.CONNECT_SECONDS", 1.0)
        with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(HostError):
            Session.connect(SshTarget(host="127.0.0.1", port=server.getsockname()[1], config=None))

    def test_no_cipher_in_common(self) -> None:
        with (
            ssh_server(config="Ciphers chacha20-poly1305@openssh.com\n") as server,
            pytest.raises(HostError, match="no SSH algorithm in common"),
        ):
            Session.connect(server.target())


class TestLink:
    def test_a_reset_link_ends_a_command(self, sshd: SshServer) -> None:
        with proxy(sshd.port) as link, Session.connect(sshd.target(port=link.port)) as made:
            process = made.start("echo up; sleep 600")
            assert process.read(10) == b"up\n"
            link.cut()
            with pytest.raises(LinkLostError):
                process.read(10)
            with pytest.raises(LinkLostError):
                made.run("true")

    def test_silence_is_noticed(self, sshd: SshServer) -> None:
        with proxy(sshd.port) as link, Session.connect(sshd.target(port=link.port)) as made:
            process = made.start("cat", silence=5.0)
            process.write(b"x")
            assert process.read(1) == b"x"
            link.freeze()
            with pytest.raises(LinkLostError, match="sent nothing"):
                process.read(1)

    def test_a_further_connection_that_cannot_be_made_is_a_lost_link(
        self, sshd: SshServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("p2v.session.login.CONNECT_SECONDS", 2.0)
        with proxy(sshd.port) as link, Session.connect(sshd.target(port=link.port)) as made:
            link.freeze()
            with pytest.raises(LinkLostError, match="no further connection"):
                made.start("true", lane=1)

    @pytest.mark.parametrize("lane", [0, 1])
    def test_a_login_that_is_not_answered_is_no_refusal(
        self, sshd: SshServer, monkeypatch: pytest.MonkeyPatch, lane: int
    ) -> None:
        from p2v.session import login

        with proxy(sshd.port) as link:
            target = sshd.target(port=link.port)
            made = Session.connect(target) if lane else None
            plain = login._attempts

            def silent(*words: Any) -> Any:
                link.freeze()  # when the host has told what it takes
                return plain(*words)

            monkeypatch.setattr("p2v.session.login._attempts", silent)
            monkeypatch.setattr("p2v.session.login.CONNECT_SECONDS", 2.0)
            if made is None:
                with pytest.raises(HostError, match="does not answer the login") as caught:
                    Session.connect(target)
                assert caught.value.exit_code == HostError.exit_code
            else:
                with pytest.raises(LinkLostError, match="does not answer the login"):
                    made.start("true", lane=lane)
                made.close()
