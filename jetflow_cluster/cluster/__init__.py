"""The served cluster: placement, actors, Serve deployments. The only package that imports Ray."""
