"""Files of requests in, files of answers out, in OpenAI's batch format: what `mball batch` and `/v1/batches` share."""
