"""Network interfaces of a machine and who configures them, from ``ip``, ``ethtool``, sysfs and configuration files. Pure functions."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from formats.machine import Nic
from p2v.collect.commands import CommandLog

_MAC = re.compile(r"(?:[0-9a-f]{2}:){5}[0-9a-f]{2}")


def nics(log: CommandLog) -> tuple[Nic, ...]:
    """The interfaces with hardware behind them, by name."""
    links = {str(link.get("ifname", "")): link for link in _objects(log.text("addresses"))}
    routes = _objects(log.text("routes"))
    files = config_files(log.text("network"))
    managers = set(log.text("managers").split())
    found = []
    for name, outcome in log.family("nic"):
        facts = dict(line.partition("=")[::2] for line in outcome.text.splitlines())
        if "device" in facts:
            mac = _mac(
                log.text(f"permanent:{name}"), str(links.get(name, {}).get("permaddr", "")), facts.get("address", "")
            )
            configured = _configured(name, mac, files, managers)
            found.append(_nic(name, mac, facts, links=links, routes=routes, configured=configured))
    return tuple(sorted(found, key=lambda nic: nic.name))


def _nic(
    name: str,
    mac: str,
    facts: Mapping[str, str],
    *,
    links: Mapping[str, dict[str, Any]],
    routes: Sequence[dict[str, Any]],
    configured: tuple[str, bool | None],
) -> Nic:
    link = links.get(name, {})
    # a bond, team or bridge has the addresses of its ports
    holder = links.get(str(link.get("master", "")), link) if not _addresses(link) else link
    carriers = {name, str(holder.get("ifname", name))}
    gateway = next(
        (str(r.get("gateway", "")) for r in routes if r.get("dst") == "default" and r.get("dev") in carriers), ""
    )
    manager, dhcp = configured
    if dhcp is None:
        dhcp = _dynamic(holder)
    return Nic(
        name=name,
        mac=mac,
        driver=facts.get("driver", ""),
        model=":".join(facts[key].removeprefix("0x") for key in ("pci_vendor", "pci_device") if key in facts),
        addresses=tuple(_addresses(holder)),
        gateway=gateway,
        dhcp=dhcp,
        configured_by=manager,
        up=facts.get("operstate") == "up" or facts.get("carrier") == "1",
    )


def _objects(text: str) -> list[dict[str, Any]]:
    try:
        found = json.loads(text) if text.strip() else []
    except ValueError:
        return []
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def _mac(*candidates: str) -> str:
    for candidate in candidates:
        match = _MAC.search(candidate.lower())
        if match is not None and match[0] != "00:00:00:00:00:00":
            return match[0]
    return ""


def _addresses(link: Mapping[str, Any]) -> list[str]:
    entries = link.get("addr_info")
    return [
        f"{entry['local']}/{entry['prefixlen']}"
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict)
        and entry.get("scope") not in {"link", "host"}
        and "local" in entry
        and "prefixlen" in entry
    ]


def _dynamic(link: Mapping[str, Any]) -> bool | None:
    entries = link.get("addr_info")
    flags = [
        bool(entry.get("dynamic", False))
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict) and entry.get("family") == "inet" and entry.get("scope") == "global"
    ]
    return any(flags) if flags else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFile:
    """The lines of a network configuration file that say who configures what (secrets are never collected)."""

    path: str
    text: str


def config_files(text: str) -> list[ConfigFile]:
    """The files of the ``network`` command's output."""
    found = []
    for part in re.split(r"^@file ", text, flags=re.MULTILINE)[1:]:
        path, _, rest = part.partition("\n")
        found.append(ConfigFile(path=path, text=rest))
    return found


def _configured(name: str, mac: str, files: Sequence[ConfigFile], managers: set[str]) -> tuple[str, bool | None]:
    """Who configures the interface, and whether by DHCP; the tool that writes another's files comes first."""
    for place, who, finder in (
        ("/etc/netplan/", "netplan", _netplan),
        ("/etc/network/interfaces", "ifupdown", _ifupdown),
        ("/etc/sysconfig/", "ifcfg", _ifcfg),
        ("/NetworkManager/", "NetworkManager", _keyfile),
        ("/systemd/network/", "systemd-networkd", _networkd),
    ):
        for file in files:
            if place in file.path and (answer := finder(name, mac, file)) is not None:
                return who, {"yes": True, "no": False}.get(answer)
    if "NetworkManager" in managers:
        return "NetworkManager", None
    return "", None


def _netplan(name: str, mac: str, file: ConfigFile) -> str | None:
    lines = file.text.splitlines()
    for number, line in enumerate(lines):
        stripped = line.strip()
        if stripped in {f"{name}:", f'"{name}":'} or (
            mac and stripped.startswith("macaddress:") and mac in stripped.lower()
        ):
            following = "\n".join(lines[number : number + 12])
            match = re.search(r"dhcp4:\s*(\w+)", following)
            return ("yes" if match[1].lower() in {"yes", "true"} else "no") if match else "no"
    return None


def _ifupdown(name: str, _mac_address: str, file: ConfigFile) -> str | None:
    match = re.search(rf"^\s*iface\s+{re.escape(name)}\s+inet\s+(\w+)", file.text, re.MULTILINE)
    return None if match is None else {"dhcp": "yes", "static": "no"}.get(match[1], "")


def _ifcfg(name: str, mac: str, file: ConfigFile) -> str | None:
    mine = file.path.endswith(f"/ifcfg-{name}")
    device = re.search(r"^DEVICE=[\"']?([^\"'\s]+)", file.text, re.MULTILINE)
    address = re.search(r"^HWADDR=[\"']?([0-9A-Fa-f:]+)", file.text, re.MULTILINE)
    if not mine and not (device and device[1] == name) and not (address and mac and address[1].lower() == mac):
        return None
    protocol = re.search(r"^BOOTPROTO=[\"']?(\w+)", file.text, re.MULTILINE)
    return "" if protocol is None else ("yes" if protocol[1].lower().startswith("dhcp") else "no")


def _keyfile(name: str, mac: str, file: ConfigFile) -> str | None:
    match = re.search(r"^interface-name=(.+)$", file.text, re.MULTILINE)
    address = re.search(r"^mac-address=(.+)$", file.text, re.MULTILINE)
    if not (match and match[1].strip() == name) and not (address and mac and address[1].strip().lower() == mac):
        return None
    method = re.search(r"^\[ipv4\].*?^method=(\w+)", file.text, re.MULTILINE | re.DOTALL)
    return "" if method is None else ("yes" if method[1] == "auto" else "no")


def _networkd(name: str, mac: str, file: ConfigFile) -> str | None:
    names = " ".join(re.findall(r"^Name=(.+)$", file.text, re.MULTILINE)).split()
    addresses = " ".join(re.findall(r"^MACAddress=(.+)$", file.text, re.MULTILINE)).lower().split()
    if not any(fnmatch.fnmatchcase(name, pattern) for pattern in names) and mac not in addresses:
        return None
    match = re.search(r"^DHCP=(\w+)", file.text, re.MULTILINE)
    return "yes" if match and match[1].lower() in {"yes", "true", "ipv4", "both"} else "no"
