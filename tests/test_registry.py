from __future__ import annotations

import math
import os
import re
import shutil
import sys
from datetime import date
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from conftest import ROOT, install, package
from engine_recipes import Ref, RequestError, merging
from engine_recipes.entries import Owner
from engine_recipes.merging import merge
from engine_recipes.registry import Fragment, Registry, load

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OURS = (ROOT / "core" / "engine_recipes" / "registry.toml").read_text()
TABLE = {key: value for key, value in tomllib.loads(OURS).items() if key != "api"}
#: Keys that mean something, and some that do not.
WORDS = sorted({word for word in re.findall(r"[a-z_0-9.-]+", OURS) if len(word) < 30})
PRECISION = '[precisions.nvfp4]\nmodule = "{module}.nvfp4"\nbits = 4\n'


def fragment(table: dict[str, object], name: str = "acme", installed: bool = True) -> Fragment:
    return Fragment(Owner(name, "0.3", Path(f"/{name}/registry.toml")), table, installed)


def test_our_own_registry_holds_the_promised_models() -> None:
    registry = load()
    assert {"smollm2-135m", "qwen2.5-72b", "qwen3-32b", "llama3.3-70b", "tinyllama-1.1b"} <= set(
        registry.models.entries
    )
    assert set(registry.families.entries) == {"llama", "qwen", "tinyllama"}
    assert str(registry.models["qwen2.5-7b"].owner).startswith("engine-recipes ")
    assert registry.expand(Ref("smollm2", "bf16")) == Ref("smollm2-135m", "bf16")


def test_an_installed_package_is_found_by_its_entry_point_and_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, package(tmp_path / "p", "acme-nvfp4", PRECISION.format(module="acme_nvfp4")))
    entry = load().precisions["nvfp4"]
    assert str(entry.owner) == "acme-nvfp4 0.3"
    assert "acme_nvfp4" not in sys.modules
    monkeypatch.setenv("RECIPES_PLUGINS", "0")
    assert "nvfp4" not in load().precisions.entries


def test_a_name_two_packages_claim_is_contested_and_only_its_use_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_world: Path
) -> None:
    for name in ("acme-nvfp4", "zeta-nvfp4"):
        install(monkeypatch, package(tmp_path / name, name, PRECISION.format(module=name.replace("-", "_"))))
    registry = load()
    with pytest.raises(RequestError, match=r"'nvfp4' is claimed by acme-nvfp4 0\.3 and zeta-nvfp4 0\.3"):
        registry.precisions["nvfp4"]
    assert [problem.owner.package for problem in registry.problems] == ["acme-nvfp4", "zeta-nvfp4"]
    assert all("is claimed by" in problem.text for problem in registry.problems)
    assert registry.precisions["fp16"].bits == 16
    user = own_world / "config" / "engine-recipes" / "registry.toml"
    user.parent.mkdir(parents=True)
    user.write_text('[prefer]\n"precisions.nvfp4" = "zeta-nvfp4"\n')
    assert load().precisions["nvfp4"].owner.package == "zeta-nvfp4"
    assert load().problems == ()


def test_user_and_project_change_fields_and_the_origin_is_remembered(own_world: Path) -> None:
    user = own_world / "config" / "engine-recipes" / "registry.toml"
    user.parent.mkdir(parents=True)
    user.write_text('[models."qwen2.5-7b"]\nsource = "/data/qwen"\nlicense = "mine"\n[defaults]\nprecision = "bf16"\n')
    Path("registry.toml").write_text('[models."qwen2.5-7b"]\nlicense = "ours"\n[aliases]\nq = "qwen2.5-7b:fp16"\n')
    registry = load()
    model = registry.models["qwen2.5-7b"]
    assert (model.source, model.license, model.family) == (("/data/qwen",), "ours", "qwen")
    assert {field: str(owner) for field, owner in model.origins.items()} == {
        "source": "your registry.toml",
        "license": "this project's registry.toml",
    }
    assert registry.defaults.precision == "bf16"
    assert registry.defaults.engines[-1] == "onnxruntime"
    assert registry.expand(Ref("q")) == Ref("qwen2.5-7b", "fp16")
    other = Path("other.toml")
    other.write_text('[models."qwen2.5-7b"]\nlicense = "other"\n')
    assert load(other).models["qwen2.5-7b"].license == "other"


def test_all_errors_of_a_local_file_come_at_once_with_path_and_suggestion() -> None:
    Path("registry.toml").write_text(
        '[models.mine]\nfamly = "qwen"\nsource = "hf:a/b"\n[precisions.fp16]\nbits = "many"\n'
        '[model.x]\n[models."Bad Name"]\n'
    )
    with pytest.raises(RequestError) as caught:
        load()
    text = str(caught.value)
    assert "the registry has 7 errors" in text
    for line in (
        "registry.toml: models.mine.famly: unknown; did you mean family?",
        "registry.toml: models.mine.family: missing",
        "registry.toml: models.Bad Name.source: missing",
        "registry.toml: precisions.fp16.bits: must be a number, not 'many'",
        "registry.toml: model: unknown; did you mean models?",
        "registry.toml: models.Bad Name: a name is lower-case letters",
        "registry.toml: models.Bad Name.family: missing",
    ):
        assert line in text


def test_an_installed_package_with_errors_hurts_only_its_own_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = '[precisions.nvfp4]\nmodul = "x"\n[precisions.good]\nmodule = "x"\n'
    install(monkeypatch, package(tmp_path / "p", "acme-nvfp4", broken))
    registry = load()
    assert [str(p.owner) for p in registry.problems] == ["acme-nvfp4 0.3"] * 2
    assert registry.problems[0].text == "precisions.nvfp4.modul: unknown; did you mean module?"
    with pytest.raises(RequestError, match=r"precisions\.nvfp4 \(acme-nvfp4 0\.3\) cannot be used"):
        registry.precisions["nvfp4"]
    assert registry.precisions["good"].module == "x"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[precisions", "cannot be read"),
        ("api = 2\n", "asks for plugin API 2"),
        ('api = "x"\n', "api = 'x' is no version of the plugin API"),
    ],
)
def test_a_file_that_cannot_be_read_is_a_problem_of_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, problem: str
) -> None:
    install(monkeypatch, package(tmp_path / "p", "acme-nvfp4", text))
    (found,) = load().problems
    assert str(found.owner) == "acme-nvfp4 0.3"
    assert problem in found.text


def test_a_setting_that_no_option_has_is_an_error() -> None:
    Path("registry.toml").write_text('[models."qwen2.5-7b".settings]\n"build.max_seq_lenn" = 3\n')
    with pytest.raises(RequestError, match=r'"build\.max_seq_lenn": unknown; did you mean build\.max_seq_len\?'):
        load()


def test_a_missing_project_file_is_said() -> None:
    with pytest.raises(RequestError, match=r"no file nowhere\.toml"):
        load(Path("nowhere.toml"))


def test_a_newer_api_in_a_local_file_is_refused_with_a_sentence() -> None:
    Path("registry.toml").write_text("api = 99\n")
    with pytest.raises(RequestError, match=re.escape("asks for plugin API 99")):
        load()


def test_unknown_names_get_a_suggestion() -> None:
    registry = load()
    with pytest.raises(RequestError, match=r"no model named 'qwen2.5-8b'\ndid you mean qwen2\.5-"):
        registry.models["qwen2.5-8b"]
    with pytest.raises(RequestError, match="no installed family knows the architecture PhiForCausalLM"):
        registry.family_of("PhiForCausalLM")


def test_a_lone_string_is_a_list_of_one_and_an_option_may_be_short() -> None:
    registry = merge(
        [
            fragment(
                {
                    "engines": {
                        "e": {"module": "m", "takes": "k", "gives": "e", "targets": "cpu", "options": {"n": 3}}
                    },
                    "models": {"m": {"family": "f", "source": "hf:a/b"}},
                }
            )
        ]
    )
    assert registry.engines["e"].takes == ("k",)
    assert registry.engines["e"].options["n"].default == 3
    assert registry.models["m"].source == ("hf:a/b",)


def test_every_source_of_ours_can_be_parsed() -> None:
    from engine_recipes.sources import parse

    for model in load().models.entries.values():
        assert [str(parse(spec)) for spec in model.source] == list(model.source)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("targets = []", "targets: names none"),
        ("costs = { memory = -1 }", "costs: no cost is below 0"),
        ("costs = { memory = nan }", "must be a finite number"),
        ("runtime = { gpu_memory = -1.0 }", "runtime: no cost is below 0"),
        ("python = 5", "must be a string"),
    ],
)
def test_an_engine_that_says_nonsense_is_an_error_with_its_path(text: str, error: str) -> None:
    Path("registry.toml").write_text(f"[engines.tensorrt-llm]\n{text}\n")
    with pytest.raises(RequestError, match=f"engines.tensorrt-llm.*{error}") as caught:
        load()
    assert "1 error:" in str(caught.value), "and nothing else is said to be wrong"


def test_the_details_of_a_broken_package_hurt_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = """api = 1
[engines.broken]
module = "broken_pack.engine"
takes = ["trtllm-checkpoint"]
gives = "broken"
targets = ["cpu"]
details = "package:broken_pack/engine.toml"
"""
    folder = package(tmp_path / "site", "broken-pack", broken)
    (folder / "broken_pack" / "engine.toml").write_text("not toml")
    install(monkeypatch, folder)
    Path("registry.toml").write_text('[models."qwen2.5-7b".settings]\n"build.max_num_tokens" = 3\n')
    assert "broken" in load().engines.entries


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"api = 2\n", "asks for plugin API 2, this is engine-recipes .* with API 1\ninstall a newer engine-recipes"),
        (b"api = true\n", "api = True is no version of the plugin API\nwrite api = 1"),
        (b"api = 0\n", "api = 0 is no version"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"x = " + b"[" * 20000, "cannot be read"),
        (b"x = " + b"9" * 5000, "cannot be read"),
        (b"[families]\n[families]\n", "cannot be read"),
        (None, "cannot be read: it is no file"),
        (b"x = 0x" + b"f" * 5000, "cannot be read: x: a number of more than 64 bits"),
        (b"[models.x]\nsettings." + b".".join([b"a"] * 3000) + b" = 1\n", "more than 20 tables in each other"),
        (b"x = " + b"[" * 30 + b"]" * 30, "more than 20 tables in each other"),
        (b"#" * 1_000_001, "it has more than 1000000 bytes"),
        (b'[models.x]\nlicense = "\\u001b]0;x\\u0007"\n', r"models\.x\.license: holds a control character"),
        (b'"\\u001b[31mx" = 1\n', r"cannot be read: \\x1b\[31mx: holds a control character"),
    ],
)
def test_a_fragment_that_is_nonsense_is_a_problem_of_its_package_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: bytes | None, said: str
) -> None:
    folder = package(tmp_path / "p", "acme-bad", "")
    file = folder / "acme_bad" / "registry.toml"
    file.unlink()
    if text is None:
        os.mkfifo(file)  # reading it would wait for ever
    else:
        file.write_bytes(text)
    install(monkeypatch, folder)
    registry = load()
    (problem,) = registry.problems
    assert str(problem.owner) == "acme-bad 0.3"
    assert re.search(said, problem.text, re.S)
    assert registry.precisions["fp16"].bits == 16


def test_an_entry_point_that_names_our_package_takes_none_of_our_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = package(tmp_path / "p", "acme-copy", "api = 1\n")
    (folder / "acme_copy-0.3.dist-info" / "entry_points.txt").write_text("[engine_recipes]\nx = engine_recipes\n")
    install(monkeypatch, folder)
    registry = load()
    assert "its entry point names engine-recipes's own package" in registry.problems[0].text
    assert registry.precisions["fp16"].owner.package == "engine-recipes"


@pytest.mark.parametrize(
    ("kind", "entry"),
    [
        ("metrics.mean_kl", 'worse = "above"\nhelp = "mine"\n'),
        ("references.transformers", 'module = "acme"\n'),
        ("precisions.fp16", 'module = "acme"\n'),
        ("families.llama", 'module = "acme"\narchitectures = "LlamaForCausalLM"\n'),
    ],
)
def test_no_package_takes_a_name_of_ours_unless_the_user_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_world: Path, kind: str, entry: str
) -> None:
    install(monkeypatch, package(tmp_path / "p", "acme-lax", f"api = 1\n[{kind}]\n{entry}"))
    registry = load()
    plural, name = kind.split(".")
    assert getattr(registry, plural)[name].owner.package == "engine-recipes"
    (problem,) = registry.problems
    assert problem.owner.package == "acme-lax"
    assert problem.text.startswith(f"{kind}: engine-recipes has one of that name; `[prefer]` in your own registry.toml")
    Path("registry.toml").write_text(f'[prefer]\n"{kind}" = "acme-lax"\n')
    assert getattr(load(), plural)[name].owner.package == "acme-lax"


def test_an_alias_that_is_the_name_of_a_model_is_none() -> None:
    model = {"family": "llama", "source": "./x"}
    evil = {"models": {"taken": model, "other": model}, "aliases": {"taken": "other", "qwen2.5-7b": "other"}}
    registry = merge([*ALONE_FRAGMENTS, fragment(evil), fragment({"models": {"taken": model}}, "zeta")])
    assert registry.expand(Ref("qwen2.5-7b")) == Ref("qwen2.5-7b")
    assert registry.expand(Ref("taken")) == Ref("taken"), "what is contested is no alias either"
    with pytest.raises(RequestError, match="is claimed by acme"):
        registry.models["taken"]


def test_an_alias_of_two_packages_is_refused_and_ours_stay() -> None:
    (alias, ref), *_ = ALONE.aliases.items()
    packages = [fragment({"aliases": {"q": f"{name}-3b", alias: "x"}}, name) for name in ("acme", "zeta")]
    registry = merge([*ALONE_FRAGMENTS, *packages])
    assert registry.aliases[alias] == ref
    with pytest.raises(RequestError, match=r"alias 'q' is claimed by acme 0\.3 and zeta 0\.3"):
        registry.expand(Ref("q"))
    assert sorted(f"{p.owner.package} {p.text.partition(':')[0]}" for p in registry.problems) == [
        "acme aliases.q",
        f"acme aliases.{alias}",
        "zeta aliases.q",
        f"zeta aliases.{alias}",
    ]
    for mine in ({"prefer": {"aliases.q": "zeta"}}, {"aliases": {"q": "zeta-3b"}}):
        merged = merge([*ALONE_FRAGMENTS, *packages, fragment(mine, "mine", installed=False)])
        assert merged.expand(Ref("q", "fp16")) == Ref("zeta-3b", "fp16")


def family(architecture: str, name: str) -> dict[str, object]:
    return {"families": {name: {"module": name, "architectures": architecture}}}


def test_an_architecture_of_two_packages_is_refused_until_the_user_chooses() -> None:
    both = [*ALONE_FRAGMENTS, *(fragment(family("XForCausalLM", f"{who}-x"), who) for who in ("acme", "zeta"))]
    with pytest.raises(
        RequestError, match=r"architecture 'XForCausalLM' is claimed by acme 0\.3 and zeta 0\.3"
    ) as caught:
        merge(both).family_of("XForCausalLM")
    assert '[prefer] "architectures.XForCausalLM" = "acme"' in caught.value.hint
    mine = fragment({"prefer": {"architectures.XForCausalLM": "zeta"}}, "mine", installed=False)
    assert merge([*both, mine]).family_of("XForCausalLM").name == "zeta-x"


def test_our_family_describes_what_it_knows_unless_the_user_prefers_another() -> None:
    both = [fragment(family("LlamaForCausalLM", "aaa"), "aaa"), *ALONE_FRAGMENTS]
    assert merge(both).family_of("LlamaForCausalLM").name == "llama"
    mine = fragment({"prefer": {"architectures.LlamaForCausalLM": "aaa"}}, "mine", installed=False)
    assert merge([*both, mine]).family_of("LlamaForCausalLM").name == "aaa"
    both = [*ALONE_FRAGMENTS, fragment(family("LlamaForCausalLM", "llama"), "aaa")]
    mine = fragment({"prefer": {"families.llama": "aaa"}}, "mine", installed=False)
    assert merge([*both, mine]).family_of("LlamaForCausalLM").owner.package == "aaa"


TUNING = """[precisions.nvfp4]
settings = { block = 32 }
[precisions.nvfp4.options.block]
max = 64
[models."qwen2.5-7b".settings]
block = 16
"""


@pytest.mark.parametrize("state", ["off", "missing", "unreadable", "newer"])
def test_what_tunes_a_package_that_is_not_there_stops_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    text = {"unreadable": "[precisions", "newer": "api = 2\n"}
    whole = PRECISION.format(module="acme") + "[precisions.nvfp4.options]\nblock = { default = 16 }\n"
    if state != "missing":
        install(monkeypatch, package(tmp_path / "p", "acme-nvfp4", text.get(state, whole)))
    Path("registry.toml").write_text(TUNING)
    if state == "off":
        assert load().precisions["nvfp4"].options["block"].max == 64
        monkeypatch.setenv("RECIPES_PLUGINS", "0")
    registry = load()
    assert registry.precisions["fp16"].bits == 16
    with pytest.raises(RequestError) as caught:
        registry.precisions["nvfp4"]
    assert caught.value.message == "no installed package has precisions.nvfp4, which registry.toml changes"
    assert "remove these lines" in caught.value.hint
    assert "module" in caught.value.hint


def test_a_wrong_key_is_an_error_whoever_has_the_name() -> None:
    Path("registry.toml").write_text("[precisions.nvfp4]\nbitz = 3\n")
    with pytest.raises(RequestError, match=r"precisions\.nvfp4\.bitz: unknown; did you mean bits"):
        load()


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("defaults", "counts only in your own or a project's registry.toml; use [models.NAME.settings]"),
        ("prefer", "counts only in your own or a project's registry.toml"),
        ("gate", "unknown"),
    ],
)
def test_what_only_the_user_decides_does_not_count_in_a_package(key: str, said: str) -> None:
    (problem,) = merge([*ALONE_FRAGMENTS, fragment({key: {}})]).problems
    assert problem.text == f"{key}: {said}"


def test_a_setting_that_no_option_has_is_a_problem_of_its_package() -> None:
    models = {"x": {"family": "llama", "source": "./x", "settings": {"nosuch": 1}}}
    (problem,) = merge([*ALONE_FRAGMENTS, fragment({"models": models})]).problems
    assert problem.text.startswith("models.x.settings.nosuch: unknown")


ALONE_FRAGMENTS = [fragment(TABLE, "engine-recipes")]
ALONE = merge(ALONE_FRAGMENTS)
TOML = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(WORDS), TOML, max_size=4))
def test_whatever_an_installed_package_registers_ours_works_as_before(table: dict[str, object]) -> None:
    table.pop("api", None)
    alone, together = ALONE, merge([*ALONE_FRAGMENTS, fragment(table)])
    for before, after in zip(alone.kinds, together.kinds, strict=True):
        for name, entry in before.entries.items():
            assert repr(after[name]) == repr(entry)
            assert together.expand(Ref(name)) == alone.expand(Ref(name))
    assert (repr(alone.gate), repr(alone.defaults)) == (repr(together.gate), repr(together.defaults))
    assert all(together.expand(Ref(name)) == alone.expand(Ref(name)) for name in alone.aliases)
    for architecture in {a for family in alone.families.entries.values() for a in family.architectures}:
        assert repr(together.family_of(architecture)) == repr(alone.family_of(architecture))


STAGE = {"module": "m"}
ENGINE = {**STAGE, "takes": "trtllm-checkpoint", "gives": "e", "targets": "cpu"}


@pytest.mark.parametrize(
    ("kind", "entry", "said"),
    [
        ("precisions", {**STAGE, "requires": ["numpy=>1"]}, "requires: 'numpy=>1' is no requirement"),
        ("precisions", {**STAGE, "requires": ["numpy>=1 |"]}, "requires: 'numpy>=1 |' is no requirement"),
        ("precisions", {**STAGE, "requires": ["x @ https://y/z.whl"]}, "requires: 'x @ https://y/z.whl'"),
        ("precisions", {**STAGE, "needs": {"compute": "8.9+"}}, "needs.compute: '8.9+' is no version range"),
        ("engines", {**ENGINE, "target_requires": {"cpu": ["numpy>=x"]}}, "target_requires.cpu: 'numpy>=x'"),
        ("engines", {**ENGINE, "binds": ["???"]}, "binds: '???' is no distribution's name"),
        ("engines", {**ENGINE, "min_driver": "new"}, "min_driver: 'new' is no version"),
        (
            "engines",
            {**ENGINE, "refuses": [{"when": {"compute": "!>=8,x"}, "why": "w", "instead": "i"}]},
            "refuses[0].when.compute: '>=8,x' is no version range",
        ),
        ("precisions", {**STAGE, "options": {"x": {"default": 1, "versions": "1"}}}, "options.x.versions: '1'"),
        ("precisions", {**STAGE, "options": {"x": [1, 2]}}, "options.x.default: must be a string or"),
        ("precisions", {**STAGE, "options": {"x": date(2024, 1, 1)}}, "options.x.default: must be a string or"),
        ("precisions", {**STAGE, "options": {"x": math.nan}}, "options.x.default: must be a finite number"),
        ("precisions", {**STAGE, "options": {"x": {"default": 1, "min": 2, "max": 1}}}, "options.x.min: 2 is above"),
        ("precisions", {**STAGE, "options": {"x": {"default": 1, "min": 2}}}, "options.x.default: 1 is nothing"),
        ("precisions", {**STAGE, "options": {"x": {"default": "b", "choices": ["a"]}}}, "options.x.default: 'b' is"),
        ("precisions", {**STAGE, "options": {"x": {"default": 1, "choices": ["a"]}}}, "options.x.choices: 'a' is of"),
        ("precisions", {**STAGE, "options": {"tp_size": "x"}}, "options.tp_size: must be a whole number"),
        ("precisions", {**STAGE, "options": {"gate.x": 1}}, 'options."gate.x": a name is'),
        ("engines", {**ENGINE, "options": {"a=b": 1}}, 'options."a=b": a name is'),
        ("precisions", {**STAGE, "limits": {"mean_kl": {"warn": math.nan}}}, "limits.mean_kl.warn: must be a finite"),
        ("precisions", {**STAGE, "bits": 10**400}, "bits: must be a finite number"),
        ("metrics", {"worse": "above", "help": "", "warn": 10**400}, "warn: must be a finite number"),
        ("models", {"family": "llama", "source": []}, "source: names none"),
        ("models", {"family": "llama", "source": "hf:../x"}, "source: 'hf:../x' is no source of a checkpoint"),
        ("models", {"family": "llama", "source": ["hf:a/b", ""]}, "source: '' is no source of a checkpoint"),
    ],
)
def test_what_later_steps_could_not_read_is_a_problem_of_its_package(
    kind: str, entry: dict[str, object], said: str
) -> None:
    registry = merge([*ALONE_FRAGMENTS, fragment({kind: {"acme": entry}})])
    (problem,) = {problem.text: problem for problem in registry.problems}.values()
    assert str(problem.owner) == "acme 0.3"
    assert problem.text.startswith(f"{kind}.acme.{said}")
    with pytest.raises(RequestError, match="cannot be used"):
        next(names for names in registry.kinds if names.kind == kind)["acme"]


def test_extras_and_markers_are_requirements() -> None:
    requires = ["numpy[x]>=1", "onnx>=1; python_version<'3.0'", "a.b~=1.2 | c-d==1.*,!=1.5", "e"]
    registry = merge([*ALONE_FRAGMENTS, fragment({"precisions": {"p": {**STAGE, "requires": requires}}})])
    assert registry.problems == ()
    assert registry.precisions["p"].requires == tuple(requires)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (
            {"models": {"x": {"family": "lama", "source": "hf:a/b"}}},
            "models.x.family: no family named 'lama'; did you mean llama?",
        ),
        ({"aliases": {"loop": "loop"}}, "aliases.loop: no model named 'loop'"),
        ({"aliases": {"short": "smollm2-135n:fp16"}}, "aliases.short: no model named 'smollm2-135n'; did you mean"),
        ({"aliases": {"odd": ":::"}}, "aliases.odd: '' in ':::' is no precision's name"),
        (
            {"precisions": {"p": {**STAGE, "limits": {"mean_kll": {"warn": 1}}}}},
            "precisions.p.limits.mean_kll: no metric has that name; did you mean mean_kl?",
        ),
    ],
)
def test_a_name_that_leads_nowhere_is_a_problem_of_its_package(table: dict[str, object], said: str) -> None:
    (problem,) = merge([*ALONE_FRAGMENTS, fragment(table)]).problems
    assert problem.text.startswith(said)
    assert merge([*ALONE_FRAGMENTS, fragment(table, installed=False)]).problems == (), (
        "a user may name what comes later"
    )


def test_a_name_that_is_unknown_may_be_one_that_was_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, package(tmp_path / "p", "acme-new", "api = 2\n"))
    with pytest.raises(RequestError, match=r"`recipes plugins` shows what was left out$"):
        load().models["m1"]


def test_two_files_of_one_package_do_not_contest_a_name_as_two_packages_do() -> None:
    both = [fragment({"models": {"m": {"family": "llama", "source": "hf:a/b"}}}) for _ in range(2)]
    with pytest.raises(RequestError, match=r"'m' stands in 2 files of acme 0\.3\nuninstall that package"):
        merge([*ALONE_FRAGMENTS, *both]).models["m"]


def test_a_fragment_that_stops_the_merging_is_a_problem_of_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("acme-bad", "acme-good"):
        fragment = f'[models.{name}]\nfamily = "llama"\nsource = "hf:a/b"\n'
        install(monkeypatch, package(tmp_path / name, name, fragment))
    whole = merging.merge

    def merge(fragments: list[Fragment], *rest: object, **more: bool) -> Registry:
        if any(f.owner.package == "acme-bad" for f in fragments):
            raise RecursionError("too deep")
        return whole(fragments, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(merging, "merge", merge)
    registry = load()
    (problem,) = registry.problems
    assert problem.owner.package == "acme-bad"
    assert problem.text.endswith("cannot be merged: RecursionError: too deep")
    assert "acme-good" in registry.models.entries


def test_a_packages_own_registry_is_no_projects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "checkout" / "core" / "engine_recipes"
    copy.mkdir(parents=True)
    for name in ("registry.toml", "hookspecs.py"):
        shutil.copy(ROOT / "core" / "engine_recipes" / name, copy)
    (tmp_path / "checkout" / "registry.toml").symlink_to("core/engine_recipes/registry.toml")
    for place in (tmp_path / "checkout", copy):
        monkeypatch.chdir(place)
        assert [owner.package for owner in load().owners] == ["engine-recipes"]
    (copy / "hookspecs.py").unlink()
    with pytest.raises(RequestError, match="gate: unknown"):
        load()
