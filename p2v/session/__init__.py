"""SSH sessions: the one package that knows paramiko.

``Session.connect(SshTarget.parse("root@host"))`` verifies the host's key, logs in, and runs commands as that user or as root.
"""

from p2v.session.remote import CommandResult, RemoteProcess, Session
from p2v.session.target import SshTarget

__all__ = ["CommandResult", "RemoteProcess", "Session", "SshTarget"]
