"""Fields of the operators' resources that `deploy/` uses, with their types, as JSON schemas that take no others.

Kubernetes' own schemas come with `kubernetes-validate`; those of operators come with no package. So this is the part of
KubeRay 1.5 to 1.7 (`ray.io/v1`, RayService) and of the Prometheus operator (`monitoring.coreos.com/v1`, PodMonitor)
that matters here, in our words. `kubectl apply --dry-run=server` asks the whole of it of a cluster that has them.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
SWITCH: Schema = {"type": "boolean"}
#: Checked as Kubernetes' own.
ANY: Schema = {"type": "object"}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}


def _object(*required: str, **fields: Schema) -> Schema:
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def _list(item: Schema) -> Schema:
    return {"type": "array", "items": item}


_GROUP = {"rayStartParams": TEXTS, "template": ANY, "resources": TEXTS, "labels": TEXTS}
_SECRET = _object(valueFrom=_object(secretKeyRef=_object("key", name=TEXT, key=TEXT)))
_CLUSTER = _object(
    "headGroupSpec",
    rayVersion=TEXT,
    enableInTreeAutoscaling=SWITCH,
    gcsFaultToleranceOptions=_object(
        "redisAddress", redisAddress=TEXT, redisPassword=_SECRET, externalStorageNamespace=TEXT
    ),
    headGroupSpec=_object("template", **_GROUP),
    workerGroupSpecs=_list(
        _object(
            *("groupName", "minReplicas", "maxReplicas", "template"),
            **_GROUP,
            groupName=TEXT,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            numOfHosts=COUNT,
        )
    ),
)
_UPGRADE = _object(
    *("gatewayClassName", "intervalSeconds", "stepSizePercent"),
    gatewayClassName=TEXT,
    intervalSeconds=COUNT,
    stepSizePercent=COUNT,
    maxSurgePercent=COUNT,
)
_KINDS = {
    ("ray.io/v1", "RayService"): _object(
        "rayClusterConfig",
        rayClusterConfig=_CLUSTER,
        serveConfigV2=TEXT,
        rayClusterDeletionDelaySeconds=COUNT,
        upgradeStrategy=_object(
            type={"enum": ["NewCluster", "NewClusterWithIncrementalUpgrade", "None"]}, clusterUpgradeOptions=_UPGRADE
        ),
    ),
    ("monitoring.coreos.com/v1", "PodMonitor"): _object(
        "selector",
        selector=_object(matchLabels=TEXTS),
        podMetricsEndpoints=_list(_object(port=TEXT, interval={"type": "string", "pattern": r"^\d+(ms|s|m|h)$"})),
    ),
}


def schema_of(document: dict[str, Any]) -> Schema:
    """Of a resource. Raises KeyError for a kind that is none of the operators'."""
    kind = (document["apiVersion"], document["kind"])
    return _object("spec", apiVersion=TEXT, kind=TEXT, metadata=ANY, spec=_KINDS[kind])
