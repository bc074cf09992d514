"""What ships in deploy/ is valid, and its dashboard and alerts read metrics that the code tells."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from jetflow_cluster.bench.panels import PANELS, grafana, metrics_of
from jetflow_cluster.cluster.config import ClusterConfig
from jetflow_cluster.cluster.ray_options import RAY_ENVIRONMENT
from jetflow_cluster.metrics import CATALOGUE, HISTOGRAM
from support.operator_fields import schema_of

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
CONFIGS = sorted((DEPLOY / "configs").glob("*.yaml"))
#: Of Qwen3-8B: heads that shards divide, and its longest sequence.
NUM_KV_HEADS, MAX_LEN = 8, 40_960


def documents(path: Path) -> list[dict[str, Any]]:
    return [found for found in yaml.safe_load_all(path.read_text()) if found]


def config_of(text: dict[str, Any]) -> ClusterConfig:
    """Checked by Serve's schema and by ours."""
    (application,) = ServeDeploySchema.model_validate(text).applications
    assert application.import_path == "jetflow_cluster.cluster.app:build_app"
    return ClusterConfig.from_mapping(application.args)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_fit_their_gpus(path: Path) -> None:
    num_gpus = int(re.findall(r"-(\d)gpu", path.stem)[0])
    config = config_of(yaml.safe_load(path.read_text()))
    per_replica = config.tensor_parallel_size + config.num_draft_workers
    assert (config.max_replicas or config.num_replicas) * per_replica == num_gpus
    assert NUM_KV_HEADS % config.tensor_parallel_size == 0 and config.max_model_len is not None
    assert config.max_model_len <= MAX_LEN
    assert (config.model, config.draft_head) == ("Qwen/Qwen3-8B", "JetSpec/jetspec-qwen3-8b")


def test_three_sizes_ship() -> None:
    assert [path.stem for path in CONFIGS] == ["qwen3-8b-1gpu", "qwen3-8b-2gpu", "qwen3-8b-4gpu"]


MANIFESTS = [
    pytest.param(document, id=f"{path.stem}-{number}")
    for path in sorted([*(DEPLOY / "kuberay").glob("*.yaml"), *(DEPLOY / "prometheus").glob("*.yaml")])
    for number, document in enumerate(documents(path))
]


def validate(document: dict[str, Any]) -> None:
    """By Kubernetes' own schemas, and by what is known of the operators'."""
    try:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
        return
    except kubernetes_validate.SchemaNotFoundError:
        jsonschema.validate(document, schema_of(document))
    # The pods in it are Kubernetes' own.
    if document["kind"] == "RayService":
        cluster = document["spec"]["rayClusterConfig"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": group["template"]["spec"]}
            kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("document", MANIFESTS)
def test_manifests_are_what_kubernetes_and_operators_take(document: dict[str, Any]) -> None:
    validate(document)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(("spec", "upgradeStrategy", "clusterUpgradeOptions", "stepSizePercent"), id="a percentage"),
        pytest.param(("spec", "rayClusterConfig", "workerGroupSpecs", 0, "minReplicas"), id="a count"),
        pytest.param(("spec", "rayClusterConfig", "headGroupSpec", "rayStartParams", "num-cpus"), id="a parameter"),
        pytest.param(
            ("spec", "rayClusterConfig", "headGroupSpec", "template", "spec", "containers", 0, "ports"), id="ports"
        ),
    ],
)
def test_a_wrong_type_is_found(path: tuple[str | int, ...]) -> None:
    *_, service = documents(DEPLOY / "kuberay" / "rayservice.yaml")
    *parents, last = path
    inner: Any = service
    for name in parents:
        inner = inner[name]
    inner[last] = {"not": ["this"]}
    with pytest.raises(jsonschema.ValidationError):
        validate(service)


def test_policies_and_monitors_name_ports_and_labels_that_pods_have() -> None:
    *_, service = documents(DEPLOY / "kuberay" / "rayservice.yaml")
    cluster = service["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    ports = {p["name"]: p["containerPort"] for g in groups for p in g["template"]["spec"]["containers"][0]["ports"]}
    (monitor,) = documents(DEPLOY / "prometheus" / "podmonitor.yaml")
    assert all(endpoint["port"] in ports for endpoint in monitor["spec"]["podMetricsEndpoints"])
    nodes, redis, budget = documents(DEPLOY / "kuberay" / "policies.yaml")
    allowed = {port["port"] for rule in nodes["spec"]["ingress"] for port in rule.get("ports", ())}
    assert allowed == {ports[name] for name in ("serve", "serve-grpc", "metrics", "dashboard")}
    # KubeRay's own label of every node.
    is_node = {"ray.io/is-ray-node": "yes"}
    assert nodes["spec"]["podSelector"]["matchLabels"] == monitor["spec"]["selector"]["matchLabels"] == is_node
    labels = [group["template"].get("metadata", {}).get("labels", {}) for group in groups]
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels[1].items()
    assert redis["spec"]["podSelector"]["matchLabels"] == {"app": "jetflow-redis"}


def test_who_gets_requests_is_asked_whether_it_can_serve() -> None:
    services = {d["metadata"]["name"]: d for d in documents(DEPLOY / "kuberay" / "rayservice.yaml")}
    service = services["jetflow"]
    selector = services["jetflow-grpc"]["spec"]["selector"].items()
    cluster = service["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        template = group["template"]
        is_selected = selector <= template.get("metadata", {}).get("labels", {}).items()
        assert is_selected == ("readinessProbe" in template["spec"]["containers"][0])
    # A head without CPUs gets no router.
    assert config_of(yaml.safe_load(service["spec"]["serveConfigV2"])).num_cpus_per_router > 0


def test_the_service_drains_before_its_pods_end() -> None:
    *_, service = documents(DEPLOY / "kuberay" / "rayservice.yaml")
    config = config_of(yaml.safe_load(service["spec"]["serveConfigV2"]))
    cluster = service["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        spec = group["template"]["spec"]
        # Serve waits 2 s, then for the drain and 5 s more.
        assert spec["terminationGracePeriodSeconds"] > config.drain_timeout_s + 10
        ports = {port["name"]: port["containerPort"] for port in spec["containers"][0]["ports"]}
        assert (ports["serve-grpc"], ports["serve"]) == (config.grpc_port, config.http_port)
        assert "metrics" in ports
    worker = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    assert worker["readinessProbe"]["httpGet"] == {"path": "/health", "port": "serve"}
    assert worker["resources"]["requests"]["nvidia.com/gpu"] == str(config.tensor_parallel_size)
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster["gcsFaultToleranceOptions"]["redisAddress"] == "jetflow-redis:6379"
    assert service["spec"]["upgradeStrategy"]["type"] == "NewClusterWithIncrementalUpgrade"


def test_grpc_is_spoken_in_clear_http2() -> None:
    services = [d for d in documents(DEPLOY / "kuberay" / "rayservice.yaml") if d["kind"] == "Service"]
    ports = {port["name"]: port for service in services for port in service["spec"]["ports"]}
    assert ports["serve-grpc"]["appProtocol"] == "kubernetes.io/h2c"
    assert ports["serve-grpc"]["port"] == 9000


def test_the_image_sets_what_nodes_need() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    assert RAY_ENVIRONMENT
    assert all(f"{name}={value}" in text for name, value in RAY_ENVIRONMENT.items())


def test_the_dashboard_is_what_the_code_says() -> None:
    shipped = json.loads((DEPLOY / "grafana" / "jetflow.json").read_text())
    assert shipped == grafana(), "python -m jetflow_cluster.bench.panels writes it anew"
    assert all(panel["targets"] for panel in shipped["panels"])
    assert len({panel.title for panel in PANELS}) == len(PANELS) >= 12


def test_dashboard_and_alerts_read_metrics_that_are_told() -> None:
    exported = {metric.exported for metric in CATALOGUE}
    exported |= {f"{metric.exported}_bucket" for metric in CATALOGUE if metric.kind == HISTOGRAM}
    texts = [series["expr"] for panel in grafana()["panels"] for series in panel["targets"]]
    rules = yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text())
    texts += [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    read = {name for text in texts for name in re.findall(r"ray_\w+", text)}
    # `tests/router/test_telling.py` shows that each of the catalogue is really told.
    assert read and read <= exported
    assert metrics_of() <= set(CATALOGUE)


def test_prometheus_files_fit_together() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    assert all((DEPLOY / "prometheus" / name).exists() for name in config["rule_files"])
    assert config["scrape_configs"][0]["file_sd_configs"][0]["files"][0].startswith("/tmp/ray/")
