"""A plan survives the round trip, and whatever is not a plan is refused with a message that helps."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from moa.demo import MODEL_FOLDER
from moa.errors import PlanError
from moa.plan import LATER_FIELDS, MAX_PLAN_BYTES, ModelShape, Plan, load_plan
from moa.plan_report import SCHEMA_FILE, schema_json
from moa.spans import MAX_TOKENS


def tiny(**changes) -> Plan:
    shape = ModelShape(architecture="LlamaForCausalLM", layers=2, heads=4, kv_heads=2, head_dim=16)
    fields = {"model": shape, "rules": (((0, 1.0), (256, 0.0)), ((-64, 0.5), (0, 0.125)))}
    return Plan.model_validate({**fields, **changes})


def full() -> Plan:
    """A plan with every record filled in."""
    plan = tiny()
    records = {
        "lengths": (plan.at_length(1024).model_dump(), plan.at_length(4096).model_dump()),
        "objective": {"predicted_loss": 0.1, "density_budget_ratio": 0.5, "lengths_tokens": (1024,)},
        "solver": {"name": "highs", "status": "optimal", "milp_status": "optimal", "bound": 0.1, "gap_ratio": 0.0},
        "calibration": {
            "dataset": "demo",
            "dataset_sha256": "0" * 64,
            "samples_per_length": 4,
            "lengths_tokens": (1024,),
            "seed": 0,
            "estimator": "exact",
            "supervision": "model",
        },
        "validation": {"length_tokens": 8192, "samples": 4, "dense_loss": 1.0, "sparse_loss": 1.1, "candidates": 3},
        "created_by": {"moa": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
    }
    return tiny(**records)


shares = st.floats(min_value=0, max_value=1)
alphas = st.integers(-MAX_TOKENS + 1, MAX_TOKENS - 1)


@st.composite
def plans(draw) -> Plan:
    layers, kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 7))
    shape = ModelShape(
        architecture=draw(st.text(max_size=8)),
        layers=layers,
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([1, 64, 80, 96])),
        dtype=draw(st.sampled_from(["float64", "float32", "bfloat16", "float16"])),
        name=draw(st.one_of(st.text(max_size=8), st.sampled_from(["@rules", '"rules": "@rules"', "\\"]))),
    )
    rules = tuple(tuple((draw(alphas), draw(shares)) for _ in range(kv_heads)) for _ in range(layers))
    sink = draw(st.integers(0, 200))
    return Plan(
        model=shape,
        rules=rules,
        sink_tokens=sink,
        min_span_tokens=sink + draw(st.integers(1, 200)),
        length_mode=draw(st.sampled_from(["running", "pinned"])),
    )


@given(plans())
def test_round_trip(plan):
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert again.sha256 == plan.sha256


@pytest.mark.parametrize("plan", [tiny(), full()], ids=["tiny", "full"])
def test_saved_plan_loads_from_file_and_folder(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == load_plan(tmp_path) == plan


def test_a_plan_from_before_its_records_had_all_their_fields_still_loads():
    """The digest of the first release's form: fields that came later are no part of it while they have their defaults."""
    content = json.loads(full().to_json())
    for name, later in LATER_FIELDS.items():
        for field in later:
            del content[name][field]
    del content["sha256"]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    assert Plan.from_json(json.dumps({**content, "sha256": digest})).sha256 == digest == full().sha256


@pytest.mark.parametrize(
    ("record", "field", "value"),
    [
        ("calibration", "chat_template_sha256", "0" * 64),
        ("calibration", "mixed_lengths", False),
        ("calibration", "influence_backends", ["torch"]),
        ("objective", "elastic", False),
        ("objective", "per_layer", True),
    ],
)
def test_a_later_field_that_says_something_is_part_of_the_digest(record, field, value):
    content = json.loads(full().to_json())
    content[record][field] = value
    with pytest.raises(PlanError, match="sha256"):
        Plan.from_json(json.dumps(content))


def test_the_plan_that_ships_loads():
    assert load_plan(MODEL_FOLDER).objective is not None


def test_plans_compare_equal_after_their_arrays_were_made():
    one, other = tiny(), tiny()
    assert one.span_rules.density_ratio(1000) == other.span_rules.density_ratio(1000)
    assert one == other


def test_costs_follow_the_spans():
    plan = tiny(model=ModelShape(architecture="x", layers=2, heads=4, kv_heads=2, head_dim=16, dtype="bfloat16"))
    kept = 4096 + 256 + (2048 - 64) + 512
    assert plan.kv_bytes(4096) == kept * 2 * 16 * 2
    assert plan.at_length(4096).density_ratio == kept / (4 * 4096)
    assert plan.distinct_rules == 4
    assert Plan.uniform(plan.model, 256, 0.0).distinct_rules == 1


def test_schema_in_the_package_is_the_model_s():
    assert SCHEMA_FILE.read_text() == schema_json(), "renew it: moa plan schema > moa/plan.schema.json"


@pytest.mark.parametrize("plan", [tiny(), full()], ids=["tiny", "full"])
def test_saved_plan_keeps_the_schema(plan):
    schema = json.loads(SCHEMA_FILE.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads(plan.to_json()), schema)


def test_schema_refuses_an_unknown_key():
    content = {**json.loads(tiny().to_json()), "rule": 1}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, json.loads(SCHEMA_FILE.read_text()))


def edited(change, plan: Plan | None = None) -> str:
    content = json.loads((plan or tiny()).to_json())
    content["sha256"] = ""
    change(content)
    return json.dumps(content)


def put(*keys, value):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


def test_sha256_may_be_left_empty_after_an_edit():
    plan = Plan.from_json(edited(put("rules", 0, 0, value=[128, 0.5])))
    assert plan.rules[0][0] == (128, 0.5)
    assert len(plan.sha256) == 64


BAD = {
    "not an object": ("[1]", "a plan is a JSON object, got list"),
    "empty": ("", "not JSON: .* line 1, column 1"),
    "truncated": (tiny().to_json()[:-20], "not JSON: .* line"),
    "binary": (b"\x80\x04\x95pickle", "not UTF-8 text: .* byte 0"),
    "utf-16": (tiny().to_json().encode("utf-16"), "not UTF-8 text"),
    "byte order mark": (b"\xef\xbb\xbf" + tiny().to_json().encode(), "not JSON: Unexpected UTF-8 BOM"),
    "lone surrogate": (edited(put("model", "name", value="x")).replace('"x"', '"\\ud800"'), "Invalid JSON"),
    "lone surrogate in text": ('{"a": "\ud800"}', "not a plan"),
    "NaN": (edited(put("rules", 0, 0, value=[0, float("nan")])), "NaN is not a number that JSON knows"),
    "Infinity": (edited(put("rules", 0, 0, value=[0, float("inf")])), "Infinity is not a number"),
    "infinite by size": (edited(put("rules", 0, 0, value=[0, 0.5])).replace("0.5", "1e999"), r"rules\[0\]\[0\]\[1\]: "),
    "huge integer": (edited(put("rules", 0, 0, value=[10**400, 0.5])), r"rules\[0\]\[0\]\[0\]: .* got "),
    "integer of many digits": ('{"schema_version": 1' + "0" * 5000 + "}", "not a plan: Exceeds the limit"),
    "deep arrays": ("[" * 200_000, "nested too deeply"),
    "deep objects": ('{"a":' * 200_000, "nested too deeply"),
    "deep inside": ('{"rules":' + "[" * 900 + "]" * 900 + "}", "plan: "),
    "repeated key": ('{"rules": 1, "rules": 2}', "'rules' occurs twice"),
    "unknown key": (edited(put("sink_token", value=3)), "unknown key 'sink_token'; did you mean 'sink_tokens'?"),
    "unknown key inside": (
        edited(put("model", "kv_head", value=3)),
        r"unknown key 'model\.kv_head'; did you mean 'kv_heads'\?",
    ),
    "unknown key in an optional record": (
        edited(put("solver", "statsu", value=""), full()),
        r"unknown key 'solver\.statsu'; did you mean 'status'\?",
    ),
    "missing key": (edited(lambda content: content.pop("rules")), "the key 'rules' is missing"),
    "missing key inside": (edited(lambda c: c["model"].pop("layers")), r"the key 'model\.layers' is missing"),
    "too few layers": (edited(lambda c: c["rules"].pop()), r"rules has 1 layers, model\.layers says 2"),
    "too few heads": (edited(lambda c: c["rules"][1].pop()), r"rules\[1\] has 1 KV heads, model\.kv_heads says 2"),
    "absurd layers": (edited(put("model", "layers", value=10**11)), "rules has 2 layers"),
    "too many layers": (edited(put("model", "layers", value=10**13)), r"model\.layers: .* got 10000000000000"),
    "heads do not divide": (
        edited(put("model", "heads", value=3)),
        r"heads \(3\) must be a multiple of kv_heads \(2\)",
    ),
    "rule of three": (edited(put("rules", 0, 0, value=[1, 0.5, 3])), r"rules\[0\]\[0\]"),
    "rule of words": (edited(put("rules", 0, 0, value=["1", 0.5])), r"rules\[0\]\[0\]\[0\]: .*integer, got '1'"),
    "fractional alpha": (edited(put("rules", 0, 0, value=[1.5, 0.5])), r"rules\[0\]\[0\]\[0\]: .*integer, got 1\.5"),
    "beta above one": (edited(put("rules", 0, 0, value=[0, 1.01])), "less than or equal to 1, got 1.01"),
    "negative beta": (edited(put("rules", 0, 0, value=[0, -0.1])), "greater than or equal to 0, got -0.1"),
    "rules are text": (edited(put("rules", value="x" * 10_000)), "rules: Input should be a valid .*, got 'xxx"),
    "floor inside the sinks": (
        edited(put("min_span_tokens", value=64)),
        r"min_span_tokens \(64\) must exceed sink_tokens",
    ),
    "negative sinks": (edited(put("sink_tokens", value=-1)), "sink_tokens: .* got -1"),
    "unknown mode": (
        edited(put("length_mode", value="walking")),
        "length_mode: .*'running' or 'pinned', got 'walking'",
    ),
    "unknown dtype": (edited(put("model", "dtype", value="int4")), r"model\.dtype: .* got 'int4'"),
    "model is no object": (edited(put("model", value=[])), "model: .* got "),
    "wrong sha256": (edited(put("sha256", value="0" * 64)), "sha256 is 000.*the content's digest is .*empty string"),
    "newer schema": (
        edited(put("schema_version", value=2)),
        "schema_version is 2, this moa reads up to 1; install a newer",
    ),
    "older schema": (edited(put("schema_version", value=0)), "schema_version must be 1, got 0"),
    "schema is true": (edited(put("schema_version", value=True)), "schema_version must be 1, got True"),
    "MoA's form": ('{"alphas": [[0]], "betas": [[1]]}', "MoA's alphas/betas form.*moa plan convert"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_with_a_message_that_helps(text, message):
    with pytest.raises(PlanError, match=message) as caught:
        Plan.from_json(text)
    said = str(caught.value)
    assert said.startswith("plan: ")
    assert "plan: plan" not in said
    assert len(said) < 400, "one message a person can read"
    assert "\n" not in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("rules", value=[[["x", "y"]] * 1000] * 100), r"rules\[0\]\[0\]\[0\]"),
        (put("lengths", value=[0] * 100_000), r"lengths\[0\]"),
        (put("objective", "lengths_tokens", value=["x"] * 100_000), r"objective\.lengths_tokens\[0\]"),
    ],
)
def test_a_flood_of_wrong_entries_is_one_error(change, message):
    with pytest.raises(PlanError, match=message) as caught:
        Plan.from_json(edited(change, full()))
    assert isinstance(caught.value.__context__, ValidationError)
    assert caught.value.__context__.error_count() == 1


def test_a_repeated_key_among_many_is_found_soon():
    pairs = ", ".join(f'"k{i}": 0' for i in range(100_000))
    with pytest.raises(PlanError, match="'k7' occurs twice"):
        Plan.from_json("{" + pairs + ', "k7": 1}')


def test_files_that_cannot_be_plans(tmp_path):
    with pytest.raises(PlanError, match="no such file; make a plan with: moa compress"):
        load_plan(tmp_path / "none.json")
    with pytest.raises(PlanError, match=r"plan\.json: no such file"):
        load_plan(tmp_path)
    with pytest.raises(PlanError, match="cannot be read"):
        load_plan("a\0b")
    big = tmp_path / "big.json"
    with big.open("wb") as file:
        file.truncate(MAX_PLAN_BYTES + 1)
    with pytest.raises(PlanError, match="larger than"):
        load_plan(big)


def test_a_plan_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        tiny().sink_tokens = 0


json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.integers(10**15, 10**40),
        st.floats(),
        st.text(max_size=6),
        st.sampled_from([-1, 0, 1, 2**31, 2**40, 2**63, 1e308, "running", "float32", ""]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=8,
)


def places(content, here=()):
    """Every place in a JSON structure, as keys to follow."""
    yield here
    children = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, child in children:
        yield from places(child, (*here, key))


@st.composite
def mutated_structures(draw) -> bytes:
    content = {"": json.loads(full().to_json())}
    for _ in range(draw(st.integers(1, 3))):
        *way, last = ("", *draw(st.sampled_from(list(places(content[""])))))
        parent = content
        for key in way:
            parent = parent[key]
        change = draw(st.sampled_from(["replace", "delete", "repeat", "rename"]))
        if change == "delete" and way:
            del parent[last]
        elif change == "repeat" and isinstance(parent[last], list):
            parent[last] = parent[last] * draw(st.integers(0, 3))
        elif change == "rename" and isinstance(parent, dict) and way:
            parent[draw(st.text(max_size=6))] = parent.pop(last)
        else:
            parent[last] = draw(json_values)
    if draw(st.booleans()) and isinstance(content[""], dict):
        content[""]["sha256"] = ""  # else nearly every mutation would end at the digest
    return json.dumps(content[""]).encode()


@st.composite
def mutated_bytes(draw) -> bytes:
    data = bytearray(full().to_json().encode())
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        stop = min(len(data), start + draw(st.sampled_from([0, 1, 1, 4, 64, 10**6])))
        inserted = draw(
            st.one_of(st.binary(max_size=4), st.sampled_from([b"[", b"{", b"1e999", b"NaN", b'"', b"\\u", b"-"]))
        )
        data[start:stop] = inserted
    return bytes(data)


def loads_or_refuses(data: bytes) -> None:
    try:
        plan = Plan.from_json(data)
    except PlanError:
        return
    assert Plan.from_json(plan.to_json()) == plan
    assert 0 < plan.at_length(4096).density_ratio <= 1


anything = st.one_of(
    mutated_structures(), mutated_bytes(), st.binary(max_size=64), json_values.map(lambda v: json.dumps(v).encode())
)


@settings(max_examples=500)
@given(anything)
def test_loading_anything_gives_a_plan_or_a_plan_error(data):
    loads_or_refuses(data)


@pytest.mark.nightly
@settings(max_examples=10_000, suppress_health_check=list(HealthCheck))
@given(anything)
def test_loading_anything_gives_a_plan_or_a_plan_error_many_times(data):
    loads_or_refuses(data)


def test_recipes_and_package_hold_no_pickle():
    root = Path(__file__).resolve().parents[1]
    for path in [*(root / "moa").rglob("*.py"), *(root / "recipes").rglob("*.py")]:
        text = path.read_text()
        assert "import pickle" not in text, path
        assert "torch.load(" not in text, path
