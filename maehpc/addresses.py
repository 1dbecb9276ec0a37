"""Addresses of this host, as numbers: names of hosts often resolve to what nobody else reaches."""

from __future__ import annotations

import ipaddress
import platform
import socket
from collections.abc import Sequence
from contextlib import suppress

import psutil

from maehpc.errors import RunError


def own_addresses(interface: str | None = None) -> dict[str, str]:
    """This host's IPv4 addresses, each with the name of its interface; of one interface, where it is named.

    Raises:
        RunError: there is no such interface, or it has no address.
    """
    found = {
        entry.address: name
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET and interface in (None, name)
    }
    if not found and interface is None:
        raise RunError(f"{platform.node()} has no IPv4 address, by which ranks find each other; see `ip address`")
    if not found:
        names = ", ".join(sorted(psutil.net_if_addrs()))
        raise RunError(f"network interface {interface} has no IPv4 address on {platform.node()}; it has {names}")
    return found


def far_first(address: str) -> tuple[bool, bool, str]:
    """Sorts addresses that reach far before those that do not."""
    parsed = ipaddress.ip_address(address)
    return parsed.is_loopback, parsed.is_link_local, address


def route_to(address: str) -> str:
    """This host's own address on the way to another."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # sends nothing
        return str(probe.getsockname()[0])


def address_for(others: Sequence[str], interface: str | None = None) -> str:
    """The address of this host by which other hosts reach it.

    Args:
        others: names of some of them; where none resolves to another host's address, an address that reaches far.
        interface: name of the network interface to use; the one on the way to them where None.

    Raises:
        RunError: there is no such interface, or it has no address.
    """
    own = own_addresses(interface)
    for name in others if interface is None else ():
        with suppress(OSError):
            address = route_to(socket.gethostbyname(name))
            if not ipaddress.ip_address(address).is_loopback:
                return address
    return min(own, key=far_first)
