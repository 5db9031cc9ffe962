from __future__ import annotations

import pytest

from ops.addresses import Target, is_public, normal_url


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "240.0.0.1",
        "255.255.255.255", "224.0.0.1", "192.88.99.1", "192.0.2.1", "198.18.0.1",
        "192.0.0.192", "192.0.0.9", "168.63.129.16", "::ffff:168.63.129.16", "64:ff9b::c000:c0", "3fff::1", "5f00::1",
        "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fec0::1", "ff02::1", "2001:db8::1", "::127.0.0.1",
        "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a00:1", "64:ff9b:1::7f00:1",
        "2002:7f00:1::", "2002:a00:1::", "2001:0:7f00:1::", "2001:0:5db8:d822::80ff:fffe",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public_are_refused(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address",
    ["93.184.216.34", "8.8.8.8", "2606:2800:220:1::1", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::"],
)
def test_public_addresses_pass(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    ("url", "wire"),
    [
        ("http://a.example", "http://a.example/"),
        ("  https://A.Example:443/x.jpg#part\n", "https://a.example/x.jpg"),
        ("http://a.example:8080/a b/ü.jpg?q=ñ&r=%20", "http://a.example:8080/a%20b/%C3%BC.jpg?q=%C3%B1&r=%20"),
        ("http://bücher.example/", "http://xn--bcher-kva.example/"),
        ("http://пример.example/картинка.jpg", "http://xn--e1afmkfd.example/%D0%BA%D0%B0%D1%80%D1%82%D0%B8%D0%BD%D0%BA%D0%B0.jpg"),
        ("http://my_pictures.a.example./x", "http://my_pictures.a.example/x"),
        ("http://a.example/x?y='\"<>", "http://a.example/x?y='%22%3C%3E"),
        ("http://a.example/x\r\nHost: b", "http://a.example/xHost:%20b"),
        ("http://[2606:2800::1]:80/x", "http://[2606:2800::1]/x"),
    ],
)  # fmt: skip
def test_urls_go_on_the_wire_as_a_browser_writes_them(url: str, wire: str) -> None:
    target = normal_url(url)
    assert isinstance(target, Target)
    assert target.url == wire
