"""Which address of this host others are told."""

from __future__ import annotations

import ipaddress
import socket

import pytest

from maehpc.addresses import address_for, own_addresses
from maehpc.errors import RunError


def test_an_interface_that_is_named_is_taken() -> None:
    assert ipaddress.ip_address(address_for(["example.invalid"], "lo")).is_loopback
    with pytest.raises(RunError, match="network interface ib7 has no IPv4 address"):
        address_for([], "ib7")


def test_names_that_mean_this_host_tell_nothing() -> None:
    """Debian resolves a host's own name to 127.0.1.1: no other host reaches that."""
    found = address_for(["localhost", "example.invalid"])
    assert found in own_addresses()
    if any(not ipaddress.ip_address(address).is_loopback for address in own_addresses()):
        assert not ipaddress.ip_address(found).is_loopback


def test_the_way_to_another_host_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    outside = [address for address in own_addresses() if not ipaddress.ip_address(address).is_loopback]
    if not outside:
        pytest.skip("this machine has no address but loopback's")
    monkeypatch.setattr(socket, "gethostbyname", lambda name: outside[-1])
    assert address_for(["other"]) == outside[-1]
