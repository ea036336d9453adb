"""Python of a host: a script is piped to it, and nothing is written there."""

from __future__ import annotations

NO_PYTHON = 96
"""Exit code where the host has no Python that will do."""

_NAMES = "python3 /usr/libexec/platform-python /usr/bin/python3 " + " ".join(f"python3.{n}" for n in range(14, 3, -1))

# In one line of POSIX sh: the first Python that will do is given the script through standard input.
# -B: no .pyc files; -I -S: nothing of the user's or the site's.
_BOOTSTRAP = """\
for p in {names}; do
  command -v "$p" >/dev/null 2>&1 || continue
  "$p" -I -S -B -c 'import sys; sys.exit(sys.version_info < (3, 4))' >/dev/null 2>&1 </dev/null || continue
  n=; i=
  {gentle}
  exec $n $i "$p" -I -S -B -c 'import os
s = b""
while len(s) < {size}: s += os.read(0, {size} - len(s)) or os._exit(1)
exec(compile(s, "agent", "exec"))' {arguments}
done
exit {no_python}"""

_GENTLE = """nice -n 10 true 2>/dev/null && n='nice -n 10'
  ionice -c 3 true >/dev/null 2>&1 && i='ionice -c 3'"""


def python_command(size: int, arguments: str, *, gentle: bool = False) -> str:
    """The command that runs a script of ``size`` bytes, which is then to be written to its standard input first.

    It takes any Python from 3.4 on, else ends with ``NO_PYTHON``. ``arguments`` are words for the shell, quoted already. ``gentle``: at low
    priority, for processor and disks.
    """
    return _BOOTSTRAP.format(
        names=_NAMES, size=size, arguments=arguments, gentle=_GENTLE if gentle else "", no_python=NO_PYTHON
    )
