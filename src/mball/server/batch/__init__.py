"""`mball batch`: a file of requests in, a file of answers out, in OpenAI's batch format."""

from mball.server.batch.cli import batch

__all__ = ["batch"]
