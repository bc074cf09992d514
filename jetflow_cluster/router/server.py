"""A router as a gRPC server."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Mapping

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from jetflow_cluster import metrics as m
from jetflow_cluster.metrics import Metrics
from jetflow_cluster.router.callers import TokenFile
from jetflow_cluster.router.config import RouterConfig
from jetflow_cluster.router.dispatcher import Dispatcher
from jetflow_cluster.router.gate import Gate
from jetflow_cluster.router.gate_interceptor import GateInterceptor
from jetflow_cluster.router.health import HealthServicer
from jetflow_cluster.router.open_inference import SERVICE as OPEN_INFERENCE
from jetflow_cluster.router.open_inference import OpenInferenceServicer
from jetflow_cluster.router.peers import Peers
from jetflow_cluster.router.ports import prefer_younger
from jetflow_cluster.router.servicer import InferenceServicer
from jetflow_cluster.router.text import TextCodec
from jetflow_cluster.router.tls import ServerCertificate
from jetflow_cluster.router.web.app import HttpApi, http_app
from jetflow_cluster.router.web.server import HttpServer
from jetflow_cluster.rpc.errors import StatusError
from jetflow_cluster.rpc.interceptor import ErrorInterceptor
from jetflow_cluster.rpc.oip import open_inference_pb2_grpc
from jetflow_cluster.rpc.options import SERVER_OPTIONS
from jetflow_cluster.rpc.secret import SecretInterceptor, with_secret
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.rpc.v1 import inference_pb2_grpc

_log = logging.getLogger(__name__)
SERVICE = pb.DESCRIPTOR.services_by_name["JetFlowInference"].full_name
#: Seconds that calls get to notice that the server stops.
_STOP_GRACE_S = 0.5
#: Seconds for connections that were being made when another router took over.
_HANDSHAKE_S = 0.2
#: Seconds between two tellings of the queue.
_TELL_S = 0.5


class RouterServer:
    """Serves `JetFlowInference`, health and reflection on one port. Make and use it on one event loop.

    It is healthy while at least one replica takes requests and it does not drain.

    Args:
        config: of the router.
        metrics: are told of requests as they run, and of the queue a few times a second.

    Raises:
        FileNotFoundError: `config.tokenizer` names no tokenizer.
        OSError, ValueError: the files of tokens or certificates cannot be read, or have a fault.
    """

    def __init__(self, config: RouterConfig, *, metrics: Metrics | None = None):
        self.config = config
        #: Where it listens, once it was started; 0 for HTTP where none is served.
        self.port = self.http_port = 0
        self._health = HealthServicer(["", SERVICE])
        self._dispatcher = Dispatcher(config, on_change=self._note_change, metrics=metrics)
        self._peers = Peers(config.router_id)
        self._codec = TextCodec(config.tokenizer) if config.tokenizer is not None else None
        self._servicer = InferenceServicer(self._dispatcher, self._peers, self._codec)
        self._server: grpc.aio.Server | None = None
        self._teller: asyncio.Task[None] | None = None
        self._http: HttpServer | None = None
        safety = config.safety
        tokens = TokenFile(safety.token_file, safety.limits) if safety.token_file is not None else None
        self._gate = Gate(tokens, safety.limits)
        self._certificate: ServerCertificate | None = None
        if safety.tls_cert_file is not None and safety.tls_key_file is not None:
            files = (safety.tls_cert_file, safety.tls_key_file, safety.tls_client_ca_file)
            self._certificate = ServerCertificate(*files)
        #: Where other routers reach this one, with the secret that lets them in.
        self.peer_address = ""
        self._peer_server: grpc.aio.Server | None = None
        #: Where the adapter for gateways listens; 0 where none is served.
        self.gateway_port = 0
        self._gateway: grpc.aio.Server | None = None

    @property
    def is_serving(self) -> bool:
        """Whether requests can be served now, as health tells it."""
        return self._health.is_serving

    @property
    def num_running(self) -> int:
        """Requests that are being served or wait."""
        return self._servicer.num_running

    async def start(self) -> int:
        """Listens, and returns the port.

        Raises:
            RuntimeError: the port is taken; OSError where it is that of HTTP.
        """
        interceptors = [ErrorInterceptor(), GateInterceptor(self._gate)]
        server = self._server = grpc.aio.server(interceptors=interceptors, options=_options(self.config))
        inference_pb2_grpc.add_JetFlowInferenceServicer_to_server(self._servicer, server)
        open_inference = OpenInferenceServicer(self._servicer, lambda: self.is_serving)
        open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(open_inference, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        health_service = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        names = (SERVICE, OPEN_INFERENCE, health_service, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        self.port = self._add_port(server, self.config.port)
        await server.start()
        if self.config.gateway_port is not None:
            await self._start_gateway(self.config.gateway_port)
        await self._start_for_peers()
        self._teller = asyncio.create_task(self._tell())
        if self.config.http_port is not None:
            self.http_port = await self._start_http(self.config.http_port)
        _log.info("router %s listens on port %d", self.config.router_id, self.port)
        return self.port

    def set_replicas(self, addresses: Mapping[str, str]) -> None:
        """Makes these the replicas, by name and ``host:port``. Those that leave finish what they run.

        Raises:
            ValueError: a name or an address cannot be one.
        """
        self._dispatcher.replicas.set_replicas(addresses)

    def set_peers(self, addresses: Mapping[str, str]) -> None:
        """Makes these the routers of the cluster, by name and ``host:port``; this one may be among them."""
        self._peers.set_peers(addresses)

    def load(self) -> pb.ServerLoad:
        """The router's queue and its view of the replicas."""
        return self._servicer.load()

    async def drain(self, timeout_s: float | None = None) -> bool:
        """Takes nothing new and waits for what runs; True when nothing is left.

        Args:
            timeout_s: seconds to wait; None is `config.drain_timeout_s`.
        """
        self._servicer.is_draining = True
        self._note_change()
        try:
            async with asyncio.timeout(self.config.drain_timeout_s if timeout_s is None else timeout_s):
                await self._servicer.wait_idle()
        except TimeoutError:
            return False
        return True

    async def hand_over(self, timeout_s: float | None = None) -> bool:
        """Leaves the ports to another router, has clients connect anew, and waits for what runs; True if all ended.

        Where another router listens on the ports, no call is refused and no stream cut, but those that take longer than
        `timeout_s`, whose clients get UNAVAILABLE. gRPC may end a call that crosses the end of its connection with
        CANCELLED, before it is served.

        Args:
            timeout_s: seconds to wait; None is `config.drain_timeout_s`.
        """
        limit_s = self.config.drain_timeout_s if timeout_s is None else timeout_s
        self._health.close()
        if self._http is not None:
            self._http.is_leaving = True
        if self.config.share_ports:
            # The next router takes new connections; those that are being made are still accepted here.
            prefer_younger({self.port, self.http_port, self.gateway_port} - {0})
            await asyncio.sleep(_HANDSHAKE_S)
        # Connections outlast what is said on them in the end.
        ends_s = limit_s + _STOP_GRACE_S
        leaving = [server.stop(ends_s) for server in (self._server, self._gateway) if server is not None]
        leaving += [self._http.hand_over(ends_s)] if self._http is not None else []
        left = asyncio.gather(*leaving)
        try:
            async with asyncio.timeout(limit_s):
                await asyncio.shield(left)
                await self._servicer.wait_idle()
        except TimeoutError:
            self._end_all()
            await left
            return False
        return True

    async def stop(self) -> None:
        """Ends what still runs, on the replicas too, and closes all connections. Safe to call twice.

        Clients of what still runs get UNAVAILABLE, on which they go on elsewhere.
        """
        if self._teller is not None:
            self._teller.cancel()
        self._health.close()
        self._end_all()
        server, self._server = self._server, None
        http, self._http = self._http, None
        if http is not None:
            await http.stop()
        peer_server, self._peer_server = self._peer_server, None
        gateway, self._gateway = self._gateway, None
        for each in (server, peer_server, gateway):
            if each is not None:
                await each.stop(_STOP_GRACE_S)
        await self._dispatcher.replicas.close()
        await self._peers.close()
        if self._codec is not None:
            self._codec.close()

    def _end_all(self) -> None:
        self._servicer.is_draining = True
        self._dispatcher.end_all(StatusError.unavailable("this server stops", retry_after_s=0.1))

    async def _tell(self) -> None:
        gauge, dispatcher = self._dispatcher.metrics.set, self._dispatcher
        while True:
            gauge(m.ROUTER_RUNNING, self.num_running)
            gauge(m.ROUTER_WAITING, dispatcher.admission.num_waiting)
            gauge(m.ROUTER_WAITING_TOKENS, dispatcher.admission.num_tokens)
            gauge(m.ROUTER_REPLICAS, dispatcher.replicas.num_serving)
            await asyncio.sleep(_TELL_S)

    def _add_port(self, server: grpc.aio.Server, port: int) -> int:
        address = f"{self.config.host}:{port}"
        if self._certificate is None:
            return int(server.add_insecure_port(address))
        return int(server.add_secure_port(address, self._certificate.grpc_credentials()))

    async def _start_gateway(self, port: int) -> None:
        try:
            from smg_grpc_proto.generated import vllm_engine_pb2_grpc

            from jetflow_cluster.router.vllm_engine import VllmEngineServicer
        except ImportError as error:
            message = f"gateway_port = {port}: needs smg-grpc-proto; pip install 'jetflow-cluster[gateway]' ({error})"
            raise ValueError(message) from None
        interceptors = [ErrorInterceptor(), GateInterceptor(self._gate)]
        server = self._gateway = grpc.aio.server(interceptors=interceptors, options=_options(self.config))
        servicer = VllmEngineServicer(self._servicer, lambda: self.is_serving, self.config.tokenizer)
        vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server(servicer, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        self.gateway_port = self._add_port(server, port)
        await server.start()

    async def _start_for_peers(self) -> None:
        secret = secrets.token_hex(16)
        interceptors = [ErrorInterceptor(), SecretInterceptor(secret)]
        server = self._peer_server = grpc.aio.server(interceptors=interceptors, options=_options(self.config))
        inference_pb2_grpc.add_JetFlowInferenceServicer_to_server(self._servicer, server)
        host = self.config.internal_host
        port = server.add_insecure_port(f"{host}:0")
        await server.start()
        self.peer_address = with_secret(secret, f"{host}:{port}")

    async def _start_http(self, port: int) -> int:
        api = HttpApi(self._servicer, self._codec, lambda: self.is_serving, self._gate)
        config = self.config
        self._http = HttpServer(
            http_app(api.routes()),
            config.host,
            port,
            certificate=self._certificate,
            stall_s=config.client_stall_s,
            max_connections=config.max_http_connections,
            share_port=config.share_ports,
        )
        return await self._http.start()

    def _note_change(self) -> None:
        self._health.set_serving(self._dispatcher.replicas.num_serving > 0 and not self._servicer.is_draining)


def _options(config: RouterConfig) -> list[tuple[str, int]]:
    options = dict(SERVER_OPTIONS) | {"grpc.so_reuseport": int(config.share_ports)}
    ages = {
        "grpc.max_connection_age_ms": config.max_connection_age_s,
        "grpc.max_connection_age_grace_ms": config.max_connection_age_grace_s,
    }
    options |= {name: round(value * 1e3) for name, value in ages.items() if value is not None}
    return list(options.items())
