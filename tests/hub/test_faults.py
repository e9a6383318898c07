"""Refusals in plain words, and requests that are repeated."""

import json
import time

import pytest

from tests.support.hub_client import FILES, REPO, WEIGHTS, ClientError, during
from tests.support.hub_server import Fault

# Refusals in plain words


@pytest.mark.parametrize(
    "code, kind, words",
    [
        ("HubFolder(parse('org/nothing'))", "Refused", "no such repository hf auth login"),
        (f"HubFolder(parse('{REPO}@v9'))", "Refused", "no such revision v9 tree/main"),
        (f"HubFolder(parse('{REPO}@{'0' * 40}'))", "Refused", "no such revision"),
        (f"HubFolder(parse('{REPO}:nowhere'))", "Refused", "no such file nowhere"),
        (
            f"HubFolder(parse('{REPO}')).read('nothing', 0, 8)",
            "Damaged",
            "no such file config.json nothing",
        ),
        (
            f"HubFolder(parse('{REPO}')).path('nothing')",
            "Damaged",
            "no such file config.json nothing",
        ),
        (f"HubFolder(parse('{REPO}')).path('../nothing')", "Refused", "plain name"),
        (
            "HubFolder(parse('org/gated')).read('config.json', 0, 2)",
            "Refused",
            "restricted ask for access org/gated",
        ),
        (
            "HubFolder(parse('org/gated')).path('config.json')",
            "Refused",
            "restricted ask for access org/gated",
        ),
        ("HubFolder(parse('org/disabled'))", "Refused", "disabled"),
        ("HubFolder(HubId('bad--/id'))", "Refused", "not a name"),
    ],
)
def test_hub_errors_are_refused_with_their_cause(reading, code, kind, words):
    _, client = reading
    error = client.refusal(code, kind)
    assert all(word in error.text for word in words.split()), error.text
    # nothing of the library's own chain
    assert "huggingface_hub/" not in error.trace and "httpx" not in error.trace


def test_a_file_that_went_away(hub, client):
    client(f"folder = HubFolder(parse('{REPO}'))")
    hub.repos[REPO].trees[client("folder.commit")].pop("config.json")
    assert (
        "no such file in this revision"
        in client.refusal("folder.read('config.json', 0, 5)", "Damaged").text
    )
    assert (
        "no such file in this revision"
        in client.refusal("folder.path('config.json')", "Damaged").text
    )


@pytest.mark.parametrize(
    "fault",
    [
        Fault(
            status=200, body=b"<html>Please log in</html>", headers={"Content-Type": "text/html"}
        ),
        Fault(status=200, body=b"{}"),
        Fault(status=200, body=b'{"id": "org/name", "sha": "../../x", "siblings": []}'),
    ],
)
def test_an_answer_that_is_no_hubs(reading, fault):
    hub, client = reading
    hub.faults = during(fault, path="/api/models")
    assert "HF_ENDPOINT" in client.refusal(f"HubFolder(parse('{REPO}'))", "Failed").parts["hint"]


def test_another_commit_than_requested_is_an_error(hub, client):
    first = hub.repos[REPO].refs["main"]
    hub.commit(REPO, {"config.json": b"{}"})
    body = json.dumps({"id": REPO, "sha": hub.repos[REPO].refs["main"], "siblings": []}).encode()
    hub.faults = during(Fault(status=200, body=body), path="/api/models")
    assert (
        first in client.refusal(f"HubFolder(parse('{REPO}@{first}'))", "Failed").parts["expected"]
    )


# Faults on the way

WRONG_RANGES = {
    "200 for a range": Fault(ignore_range=True),
    "body cut": Fault(cut=3),
    "other range": Fault(headers={"Content-Range": f"bytes 0-99/{len(WEIGHTS)}"}),
    "other file": Fault(headers={"Content-Range": "bytes 100-199/4000"}),
    "no range": Fault(headers={"Content-Range": ""}),
    "wrong length": Fault(headers={"Content-Length": "50"}),
    "compressed": Fault(headers={"Content-Encoding": "gzip"}),
    "past the end": Fault(status=416, headers={"Content-Range": "bytes */9"}),
    "200 that claims a range": Fault(
        status=200, body=WEIGHTS[:100], headers={"Content-Range": f"bytes 100-199/{len(WEIGHTS)}"}
    ),
    "a page": Fault(status=200, body=b"<html>log in</html>"),
    "503": Fault(status=503),
    "429": Fault(status=429, headers={"Retry-After": "0"}),
    "reset": Fault(reset=True),
}


@pytest.mark.parametrize("name", WRONG_RANGES)
def test_wrong_ranges_are_requested_again_then_refused(reading, name):
    hub, client = reading
    client(f"folder = HubFolder(parse('{REPO}'))")
    hub.log.clear()
    hub.faults = during(WRONG_RANGES[name], path="resolve", times=2)
    assert client("folder.read('model.safetensors', 100, 200)") == WEIGHTS[100:200]
    assert len(hub.log) == 3
    client(f"folder = HubFolder(parse('{REPO}'))")  # one that has not read it
    hub.log.clear()
    hub.faults = during(WRONG_RANGES[name], path="resolve")
    with pytest.raises(ClientError) as caught:
        client("folder.read('model.safetensors', 100, 200)")
    assert caught.value.kind in ("Failed", "Unreachable") and all(caught.value.parts.values()), (
        caught.value.trace
    )
    assert (
        REPO in caught.value.parts["where"] and "model.safetensors" in caught.value.parts["where"]
    )
    assert len(hub.log) == client("retry.TRIES") == 5


@pytest.mark.parametrize(
    "fault", [Fault(status=500), Fault(status=503), Fault(reset=True), Fault(cut=20)]
)
def test_listings_are_requested_again(reading, fault):
    hub, client = reading
    hub.faults = during(fault, path="/api/models", times=2)
    assert client(f"HubFolder(parse('{REPO}')).files()['config.json']") == len(FILES["config.json"])


def test_a_server_that_stays_down(reading):
    hub, client = reading
    hub.faults = during(Fault(status=503, body=b'{"error": "maintenance"}'), path="/api/models")
    with pytest.raises(ClientError) as caught:
        client(f"HubFolder(parse('{REPO}'))")
    assert caught.value.kind == "Failed" and "503: maintenance" in caught.value.text
    assert len(hub.asked("GET", "/api/models")) == 5


def test_waiting_as_long_as_the_server_asks(reading):
    hub, client = reading
    client(f"folder = HubFolder(parse('{REPO}'))")
    hub.faults = during(
        Fault(status=429, headers={"ratelimit": '"api";r=0;t=1'}), path="resolve", times=1
    )
    started = time.monotonic()
    assert client("folder.read('model.safetensors', 0, 8)") == WEIGHTS[:8]
    assert time.monotonic() - started > 0.9
    busy = (
        "type('E', (Exception,), {'response': type('R', (), {'status_code': 503, 'headers': "
        "%s})})()"
    )
    headers = {"retry-after": "99999"}
    assert client(f"retry.seconds_to_wait({busy % headers}, 1)") == 120.0


def test_a_stalled_server(hub, connect):
    hub.commit(REPO, FILES)
    client = connect(hub, HF_HUB_DOWNLOAD_TIMEOUT="1")
    client("listing.TIMEOUT = 0.5")
    hub.faults = during(Fault(delay=1.5), times=1, path="/api/models")
    client(f"folder = HubFolder(parse('{REPO}'))")
    hub.faults = during(Fault(delay=1.5), times=1, path="resolve")
    assert client("folder.read('model.safetensors', 0, 8)") == WEIGHTS[:8]
