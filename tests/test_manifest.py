from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from typing import Any

import pytest

from roll_ckpt.errors import Damaged
from roll_ckpt.formats import manifests, records, sealed_json
from roll_ckpt.formats.records import Expected, Vote

EXPECTED = Expected("checkpoint-7", 7, "run", 2, 1, {"actor": 2, "critic": 1}, True, "roll_ckpt test")


def vote(cluster: str, rank: int) -> Vote:
    receipts = (records.receipt_of_bytes(f"{cluster}/{rank}.pt", b"x" * 9),)
    return Vote(cluster, rank, 2, 1, receipts, facts={"framework": "none", f"of {rank}": rank})


def votes() -> dict[str, bytes]:
    cast = [vote("critic", 0), vote("actor", 1), vote("actor", 0)]
    return {f"{v.cluster}.{v.rank}.json": v.to_bytes() for v in cast}


def test_the_manifest_is_a_pure_function_of_the_votes() -> None:
    built = manifests.build(votes(), EXPECTED.to_bytes())
    assert built == manifests.build(dict(sorted(votes().items())), EXPECTED.to_bytes())
    told = manifests.parse(built, "here")
    assert told.to_bytes() == built
    assert [r.path for r in told.files] == ["actor/0.pt", "actor/1.pt", "critic/0.pt", "votes/expected.json"]
    assert told.clusters["actor"] == {"framework": "none", "of 0": 0, "of 1": 1, "world_size": 2}


def test_every_flipped_bit_of_a_record_shows() -> None:
    data = vote("actor", 0).to_bytes()
    for at in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[at] ^= 1 << bit
            with pytest.raises(Damaged, match="here"):
                records.parse_vote(bytes(flipped), "here")


def test_a_record_is_one_line_a_key() -> None:
    assert sealed_json.canonical({"b": {"y": [1], "x": {}}, "a": None}) == (
        b'{\n "a": null,\n "b": {\n  "x": {},\n  "y": [1]\n }\n}\n'
    )


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/./b", "a//b", "a\\b", "", "a\0b"])
def test_a_path_that_leaves_the_unit_is_refused(path: str) -> None:
    receipt = {"nbytes": 1, "block_bytes": 4096, "root": "0" * 64}
    record = sealed_json.unseal(vote("actor", 0).to_bytes(), "")
    with pytest.raises(Damaged, match="refused"):
        records.parse_vote(sealed_json.seal({**record, "receipts": {path: receipt}}), "votes/actor.0.json")


HOSTILE: list[tuple[str, Any]] = [
    ("format", 99), ("name", "../up"), ("name", 3), ("step", -1), ("step", True), ("epoch", 1.5),
    ("attempt", -1), ("clusters", {}), ("clusters", {"a": {}}), ("clusters", {"a": {"world_size": 10**9}}),
    ("clusters", []),
    ("files", {"a": {}}), ("files", {"a": []}), ("files", []), ("votes", {"x": "y"}), ("votes", {}),
    ("save_latest", 1), ("directories_durable", None), ("run_id", None), ("unknown", 1),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), HOSTILE)
def test_a_manifest_with_wrong_types_or_ranges_is_refused(key: str, value: Any) -> None:
    record = sealed_json.unseal(manifests.build(votes(), EXPECTED.to_bytes()), "")
    with pytest.raises(Damaged, match="here"):
        manifests.parse(sealed_json.seal({**record, key: value}), "here")


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"a": NaN}', b"1" * 10_000, b'{"sha256": 1}\n'],
)
def test_bytes_that_are_no_record_are_refused(data: bytes) -> None:
    for parse in (
        manifests.parse,
        records.parse_vote,
        records.parse_expected,
        records.parse_decision,
    ):
        with pytest.raises(Damaged, match="here"):
            parse(data, "here")


def test_pretty_printing_a_manifest_breaks_it() -> None:
    record = json.loads(manifests.build(votes(), EXPECTED.to_bytes()))
    with pytest.raises(Damaged, match="not as they were written"):
        manifests.parse(json.dumps(record, indent=2).encode(), "here")


CHANGES: list[tuple[Callable[[Vote], Vote], str]] = [
    (lambda v: replace(v, error="disk full"), "cluster 'actor' rank 1 failed: disk full"),
    (lambda v: replace(v, attempt=2), "belongs to attempt 2.2"),
    (lambda v: replace(v, rank=0), "is the vote of cluster 'actor' rank 0"),
    (lambda v: replace(v, receipts=(records.receipt_of_bytes("actor/0.pt", b""),)), "different bytes"),
    (lambda v: replace(v, receipts=(records.receipt_of_bytes("decision", b""),)), "only the commit itself"),
    (lambda v: replace(v, receipts=(records.receipt_of_bytes("actor/0.pt/x", b""),)), "below a file"),
]


@pytest.mark.parametrize(("change", "reason"), CHANGES)
def test_votes_that_contradict_build_no_manifest(change: Callable[[Vote], Vote], reason: str) -> None:
    cast = {**votes(), "actor.1.json": change(vote("actor", 1)).to_bytes()}
    with pytest.raises(Damaged, match=reason):
        manifests.build(cast, EXPECTED.to_bytes())


def test_roots_depend_on_sizes_and_every_block() -> None:
    data = bytes(range(256)) * 5
    root = records.receipt_of_bytes("f", data, 256).root
    assert root == records.root_of(1280, 256, records.digest_bytes(data, 256))
    assert root != records.receipt_of_bytes("f", data, 512).root
    assert records.receipt_of_bytes("f", b"").root == records.root_of(0, records.BLOCK_BYTES, [])
    with pytest.raises(ValueError, match="cannot cover"):
        records.root_of(1280, 256, [1, 2, 3, 4])


def test_the_software_is_named_as_the_package_is() -> None:
    assert f"roll_ckpt {metadata.version('roll-ckpt')}" == records.SOFTWARE


def test_a_small_manifest_cannot_ask_for_more_names_than_memory_holds() -> None:
    record = sealed_json.unseal(manifests.build(votes(), EXPECTED.to_bytes()), "")
    facts = {f"c{at}": {"world_size": 1 << 16} for at in range(2000)}
    with pytest.raises(Damaged, match="votes are not those"):
        manifests.parse(sealed_json.seal({**record, "clusters": facts}), "here")


def test_a_path_of_absurd_length_is_refused() -> None:
    record = sealed_json.unseal(vote("actor", 0).to_bytes(), "")
    receipt = {"nbytes": 1, "block_bytes": 4096, "root": "0" * 64}
    with pytest.raises(Damaged, match="characters"):
        records.parse_vote(
            sealed_json.seal({**record, "receipts": {"a/" * 50_000 + "b": receipt}}), "votes/actor.0.json"
        )
