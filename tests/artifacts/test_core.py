"""Documents that earlier versions wrote, and the schemas that they published."""

from __future__ import annotations

import json

import pytest

import trainable_core
from tests.artifacts import documents
from tests.artifacts.versions import FOLDER, VERSIONS, document, every_version
from tests.core.json_schema import JsonSchema
from trainable_core import QuantizationRecipe
from trainable_core.cli import main
from trainable_core.documents.plan import plan_document, plan_from_document


@pytest.fixture(scope="module")
def schemas(tmp_path_factory):
    """The schemas that this version publishes."""
    path = tmp_path_factory.mktemp("schemas") / "schemas.json"
    assert main(["schema", "--output", str(path)]) == 0
    return json.loads(path.read_text(encoding="utf-8"))


def test_this_version_has_written_artifacts():
    assert trainable_core.__version__ in VERSIONS


@every_version
def test_configs_are_read(version):
    found = document(version, "core", "configs")
    assert found.keys() == documents.CONFIGS.keys()
    for name, fields in found.items():
        config = documents.CONFIGS[name]
        assert type(config).model_validate(fields) == config


@every_version
def test_a_recipe_is_read_from_json_and_from_yaml(version):
    expected = QuantizationRecipe.model_validate(documents.RECIPE)
    assert QuantizationRecipe.model_validate(document(version, "core", "recipe")) == expected
    assert QuantizationRecipe.of(FOLDER / version / "core" / "recipe.yaml") == expected


@every_version
def test_a_recipe_gives_the_same_plans(version):
    recipe = QuantizationRecipe.model_validate(document(version, "core", "recipe"))
    plans = [plan_from_document(each) for each in document(version, "core", "plans")]
    assert recipe.resolve(documents.LAYERS) == plans


@every_version
def test_a_plan_says_what_it_said(version):
    stem, body, relu, head = [plan_from_document(each) for each in document(version, "core", "plans")]
    assert stem.weights["weight"].config.n_bits == 8
    assert stem.weights["weight"].training_method == "LSQ"
    assert body.weights["weight"].training_method == "DQA"
    assert [each.n_bits for each in body.weights["weight"].config.candidates] == [2, 4]
    assert body.activation.config.quantization_method.name == "UNIFORM"
    assert (relu.weights, relu.activation) == ({}, None)
    assert head.weights == {}
    assert plan_from_document(json.loads(json.dumps(plan_document(body)))) == body


@every_version
def test_todays_schemas_accept_the_documents(version, schemas):
    kinds = {
        "weights": "TrainableQuantizerWeightsConfig",
        "activation": "TrainableQuantizerActivationConfig",
        "candidate": "TrainableQuantizerCandidateConfig",
    }
    found = document(version, "core", "configs")
    for name, kind in kinds.items():
        assert JsonSchema(schemas[kind]).accepts(found[name])
    recipe = JsonSchema(schemas["QuantizationRecipe"])
    assert recipe.accepts(document(version, "core", "recipe"))
    assert not recipe.accepts({"weights": {"n_bits": "many"}})


@every_version
def test_what_a_schema_had_is_still_there(version, schemas):
    for kind, schema in document(version, "core", "schemas").items():
        assert schema["properties"].keys() <= schemas[kind]["properties"].keys()
        assert set(schemas[kind].get("required", [])) <= set(schema.get("required", [])), "a new field has a default"
