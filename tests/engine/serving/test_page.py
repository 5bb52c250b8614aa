"""The page's file and its policy; `test_browser` has what it does."""

import base64
import hashlib
import re
from pathlib import Path

from longshadow.engine.serving.page import content_security_policy, page_routes
from tests.engine.serving.conftest import serving
from tests.engine.serving.fake_engine import FakeEngine


def fetch():
    with serving(FakeEngine()) as server, server.client() as client:
        return client.get("/")


def test_the_policy_allows_the_pages_own_script_and_style_only():
    response = fetch()
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    for tag in ("script", "style"):
        [content] = re.findall(rf"<{tag}>(.*?)</{tag}>", response.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"


def test_another_script_gets_another_hash():
    one, other = (content_security_policy(f"<script>{code}</script><style></style>") for code in ("1", "2"))
    assert one != other


def test_the_page_needs_nothing_from_elsewhere():
    html = fetch().text
    assert re.findall(r"https?://[^'\"\s]+", html) == ["http://www.w3.org/2000/svg"], "the namespace of the icon"
    assert "<script src" not in html and "@import" not in html
    assert "url(" not in html


def test_nothing_becomes_markup():
    html = fetch().text
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", html)
    assert not re.search(r"<[^>]+\s(style|on[a-z]+)=", html), "which the policy would refuse"


def test_the_page_is_no_part_of_the_description():
    assert [route.include_in_schema for route in page_routes().routes] == [False]


def test_the_page_belongs_to_the_package():
    setup = Path(__file__).resolve().parents[3] / "setup.py"
    assert '"longshadow.engine.serving": ["page.html"]' in setup.read_text()
