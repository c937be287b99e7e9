"""The live feed: what it sends, to whom and how often, and that it costs nothing when nobody looks.

With a real server and a real browser it is tested in tests/browser.
"""

from __future__ import annotations

import base64
import itertools
import json
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

LAYERS, STYLES = ["down.0.to_q", "mid.to_v", "up.1.to_q"], ["ink", "gold"]
ROLES = ("positive", "negative")


class Listening:
    """Keeps the messages, in the place of the server, of which tests in this folder have none."""

    def __init__(self, client: str | None = "tab", sockets: tuple[str, ...] = ("tab", "other")) -> None:
        self.client_id = client
        self.sockets = dict.fromkeys(sockets)
        self.sent: list[tuple[float, str, dict, str | None]] = []
        workflow = {"extra_pnginfo": {"workflow": {"id": "w"}}}
        self.prompt_queue = SimpleNamespace(get_current_queue_volatile=lambda: ([(0, "p", {}, workflow, [])], []))

    def send_sync(self, event: str, data: dict, sid: str | None) -> None:
        self.sent.append((time.monotonic(), event, data, sid))

    def messages(self, ended: int = 1) -> list[dict]:
        """The messages up to the end of so many runs."""
        deadline = time.monotonic() + 10
        while sum("end" in data for _, _, data, _ in list(self.sent)) < ended:
            assert time.monotonic() < deadline, self.sent
            time.sleep(0.01)
        return [data for _, _, data, _ in self.sent]


@pytest.fixture(scope="module")
def live(pack):
    return pack.submodule("integration.live")


@pytest.fixture
def server(monkeypatch) -> Listening:
    listening = Listening()
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=listening)))
    return listening


def probabilities(seed: int = 0, images: int = 2, roles: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(roles, len(LAYERS), images, len(STYLES), generator=generator).softmax(-1)


def columns(messages: list[dict]) -> dict[int, torch.Tensor]:
    """Step -> (roles, layers, styles) in 0 to 1, NaN where there is none; a later message replaces an earlier."""
    found = {}
    for message in messages:
        data = torch.frombuffer(bytearray(base64.b64decode(message["values"])) or bytearray(1), dtype=torch.uint8).float()
        offset = 0
        for column in message["columns"]:
            shape = (len(column["roles"]), message["layers"], message["styles"])
            size = shape[0] * shape[1] * shape[2]
            values = data[offset : offset + size].reshape(shape)
            found[column["step"]] = torch.where(values == 255, torch.nan, values / 254)
            offset += size
    return found


def test_every_step_arrives_as_the_mean_over_images(live, server) -> None:
    given = {step: probabilities(step) for step in range(30)}
    feed = live.LiveFeed("1:2:3", "ink.safetensors", LAYERS, STYLES)
    for step, values in given.items():
        feed.step(step, 30, 14.0 - step, ROLES, values)
        time.sleep(0.01)
    feed.close(finished=True)
    messages = server.messages()
    found = columns(messages)
    assert set(found) == set(given), "no holes"
    for step, values in given.items():
        torch.testing.assert_close(found[step], values.mean(2), rtol=0, atol=0.6 / 254)
    assert {m["node"] for m in messages} == {"1:2:3"} and len({m["run"] for m in messages}) == 1
    assert (messages[0]["prompt"], messages[0]["workflow"], messages[0]["steps"]) == ("p", "w", 30)
    assert messages[0]["columns"][0] == {"step": 0, "sigma": 14.0, "roles": ROLES}
    assert [m["end"] for m in messages if "end" in m] == ["finished"]


def test_ten_messages_a_second_and_names_seldom(live, server) -> None:
    feed = live.LiveFeed("1", "ink", LAYERS, STYLES)
    started = time.monotonic()
    for step in range(60):
        feed.step(step, 60, 1.0, ROLES, probabilities())
        time.sleep(0.01)
    feed.close(finished=True)
    messages = server.messages()
    seconds = time.monotonic() - started
    assert 2 <= len(messages) <= seconds / live.INTERVAL + 2
    times = [sent[0] for sent in server.sent]
    assert all(later - earlier > 0.9 * live.INTERVAL for earlier, later in itertools.pairwise(times))
    named = [index for index, message in enumerate(messages) if "names" in message]
    assert named[0] == 0 and named[-1] == len(messages) - 1
    assert len(named) <= seconds / live.NAMES_INTERVAL + 2
    assert messages[0]["names"]["layers"] == LAYERS and messages[0]["names"]["styles"] == STYLES


def test_the_browser_is_told_what_layers_are_called_and_which_words_choose_them(live, server) -> None:
    layers = [
        "conv_in",
        "down_blocks.1.attentions.0.transformer_blocks.2.attn1.to_q",
        "mid_block.resnets.0.conv1",
        "up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_v",
        "transformer_blocks.3.attn.to_q",
    ]
    feed = live.LiveFeed("1", "ink", layers, STYLES, convolutions={"conv_in", "mid_block.resnets.0.conv1"})
    feed.close(finished=True)
    names = json.loads(json.dumps(server.messages()[0]["names"]))
    assert names["layers"] == layers
    assert names["labels"] == ["conv_in", "down 1.0.2 self to_q", "mid.0 res conv1", "up 0.1 cross to_v", layers[4]]
    assert names["blocks"] == ["conv_in", "down 1", "mid", "up 0", "transformer_blocks.3"]
    groups = names["groups"]
    assert (groups["all"], groups["conv"], groups["linear"]) == ([0, 1, 2, 3, 4], [0, 2], [1, 3, 4])
    assert (groups["attention"], groups["self"], groups["cross"], groups["feed-forward"]) == ([1, 3, 4], [1, 4], [3], [])
    assert (groups["down"], groups["mid"], groups["up"]) == ([1], [2], [3])
    assert (groups["down.1"], groups["up.0"], groups["block.3"]) == ([1], [3], [4])


def test_missing_layers_and_images(live, server) -> None:
    values = probabilities(images=3)
    values[0, 1] = torch.nan  # a layer that was not called for the positive prompt
    values[1, 2, 0] = torch.nan  # one image of three without a value
    feed = live.LiveFeed("1", "ink", LAYERS, STYLES)
    feed.step(0, 1, 1.0, ROLES, values)
    feed.close(finished=False)
    messages = server.messages()
    found = columns(messages)[0]
    assert found[0, 1].isnan().all() and found.isnan().sum() == len(STYLES)
    torch.testing.assert_close(found[1, 2], values[1, 2, 1:].mean(0), rtol=0, atol=0.6 / 254)
    assert messages[-1]["end"] == "interrupted"


@pytest.mark.parametrize(
    ("client", "sockets", "audience"),
    [("tab", ("tab", "other"), {"tab"}), ("gone", ("other",), {None}), (None, ("other",), set())],
)
def test_who_gets_it(live, server, client, sockets, audience) -> None:
    server.client_id, server.sockets = client, dict.fromkeys(sockets)
    feed = live.LiveFeed("1", "ink", LAYERS, STYLES)
    feed.step(0, 1, 1.0, ROLES, probabilities())
    feed.close(finished=True)
    if audience:
        server.messages()
    assert {sid for *_, sid in server.sent} == audience
    assert {event for _, event, _, _ in server.sent} <= {live.EVENT}


def test_a_browser_that_comes_later_sees_the_rest(live, server) -> None:
    server.sockets.clear()
    feed = live.LiveFeed("1", "ink", LAYERS, STYLES)
    before = set(threading.enumerate())
    feed.step(0, 3, 1.0, ROLES, probabilities())
    assert set(threading.enumerate()) == before, "nobody listens: no thread"
    server.sockets["tab"] = None
    feed.step(1, 3, 1.0, ROLES, probabilities())
    feed.step(2, 3, 1.0, ("positive",), probabilities(roles=1))
    feed.close(finished=True)
    messages = server.messages()
    assert set(columns(messages)) == {1, 2}
    assert "names" in messages[0]


def test_threads_end_with_the_run(live, server) -> None:
    before = set(threading.enumerate())
    for _ in range(5):
        feed = live.LiveFeed("1", "ink", LAYERS, STYLES)
        feed.step(0, 1, 1.0, ROLES, probabilities())
        feed.close(finished=True)
    server.messages(ended=5)
    deadline = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


def test_a_slow_network_loses_the_oldest_steps_not_memory(live, server, monkeypatch) -> None:
    slow = threading.Event()
    send = server.send_sync

    def wait_and_send(event: str, data: dict, sid: str | None) -> None:
        slow.wait(10)
        send(event, data, sid)

    monkeypatch.setattr(server, "send_sync", wait_and_send)
    feed = live.LiveFeed("1", "ink", LAYERS, STYLES)
    total = live.MOST_WAITING + 50
    for step in range(total):
        feed.step(step, total, 1.0, ROLES, probabilities())
        if step == 0:
            time.sleep(0.05)  # the first message is on its way
    feed.close(finished=True)
    slow.set()
    found = columns(server.messages())
    assert total - 1 in found and len(found) <= live.MOST_WAITING + 40


def test_no_server_is_no_error(live, monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "server", raising=False)
    feed = live.LiveFeed("1", "ink", LAYERS, STYLES)
    feed.step(0, 1, 1.0, ROLES, probabilities())
    feed.close(finished=True)


def test_a_wrong_shape_names_both(live, server) -> None:
    feed = live.LiveFeed("1", "ink", LAYERS, STYLES)
    with pytest.raises(ValueError, match=r"shape \(2, 3, 2\), expected .*\(2, 3, 2\)"):
        feed.step(0, 1, 1.0, ROLES, probabilities()[:, :, 0])
