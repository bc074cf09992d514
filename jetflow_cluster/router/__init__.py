"""The gRPC front of a cluster: admission, choice of replica, streaming, cancellation, resume."""
