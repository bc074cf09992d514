"""The data plane of one replica: an engine that steps in a thread, served to routers over gRPC. Without Ray."""
