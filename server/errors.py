"""Every error that a client can cause or see. Each class owns its HTTP status; one handler renders them.

AdapterdError
├── InvalidRequest          422  a field of the request
├── InvalidAdapter          422  a file, tensor or field of an uploaded adapter
├── Unauthorized            401  no key, or none that is known
├── Forbidden               403  the key may not do this
├── RateLimited             429  the key asks too often; carries Retry-After
├── UnknownAdapter          404
├── UnknownVersion          404
├── WrongTask               409  an adapter of another task than the route's
├── Conflict                409  somebody else released at the same moment
├── RefusedRelease          409  an upload does worse than what serves
├── TooLarge                413  a text, a list or a body over its limit
├── Overloaded              429  the queue is full, or too long for the request's deadline; carries Retry-After
├── ClientGone              499  the client hung up; nobody reads this
├── StoreUnavailable        503  the store failed; carries Retry-After
├── IssuerUnavailable       503  a token cannot be checked now; carries Retry-After
├── MemoryFull              503  all adapters in memory are in use; carries Retry-After
├── OverBudget              507  an adapter is larger than the memory for adapters
├── WarmingUp               503  only where somebody asks whether the server is ready; carries Retry-After
├── ShuttingDown            503  carries Retry-After
├── DeviceStopped           503  the device's thread has died; only a restart helps
├── AdapterQuarantined      503  an adapter failed again and again; carries Retry-After
├── DeadlineExceeded        504  the answer was not there in time
├── CorruptVersion          500  a stored version that is not what its name says
├── NotFiniteOutput         500  an adapter overflowed on this text
├── UnservableAdapter       500  a stored version that was made for another backbone
├── BadConfiguration        500  keys or settings that make no sense; ends the start
└── BackboneError           500  the backbone cannot be loaded or served
"""

from typing import ClassVar, Self


class AdapterdError(Exception):
    """Base of all errors with a status. `param` names the field, file or tensor at fault."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"
    fault: ClassVar[bool] = True
    """Whether a status of 500 or more means that something is wrong, which the log is to show."""
    retry_after: int | None = None  # seconds

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.error_code = code or type(self).code

    def about(self, param: str, message: str | None = None) -> Self:
        """The same error, said to be about another field, in other words where given."""
        error = type(self)(message or self.message, param=param, code=self.error_code)
        error.retry_after = self.retry_after
        return error


class InvalidRequest(AdapterdError):
    """A field of the request is not acceptable."""

    status = 422
    type = "invalid_request_error"
    code = "invalid_request"


class InvalidAdapter(AdapterdError):
    """An adapter that cannot be served. `param` names the tensor, file or field."""

    status = 422
    type = "invalid_adapter_error"
    code = "invalid_adapter"


class Unauthorized(AdapterdError):
    """Nobody that the server knows."""

    status = 401
    type = "authentication_error"
    code = "unauthorized"


class Forbidden(AdapterdError):
    """Somebody who may not do this."""

    status = 403
    type = "permission_error"
    code = "forbidden"


class RateLimited(AdapterdError):
    """Somebody who asks more often than agreed."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limited"
    retry_after = 1


class UnknownAdapter(AdapterdError):
    """No released adapter has this name."""

    status = 404
    type = "not_found_error"
    code = "adapter_not_found"


class UnknownVersion(AdapterdError):
    """The adapter has no such version."""

    status = 404
    type = "not_found_error"
    code = "version_not_found"


class WrongTask(AdapterdError):
    """The adapter does not do what was asked."""

    status = 409
    type = "invalid_request_error"
    code = "wrong_task"


class Conflict(AdapterdError):
    """Another writer made the release that this one wanted to make."""

    status = 409
    type = "conflict_error"
    code = "release_conflict"


class RefusedRelease(AdapterdError):
    """An upload does worse on its own evaluation data than the version that serves."""

    status = 409
    type = "conflict_error"
    code = "evaluation_below_current"


class TooLarge(AdapterdError):
    """A text, a list of texts or a body is over its limit."""

    status = 413
    type = "invalid_request_error"
    code = "too_large"


class Overloaded(AdapterdError):
    """The queue is full, or too long for the request's deadline; the client should come back."""

    status = 429
    type = "overloaded_error"
    code = "overloaded"
    retry_after = 1
    wait_seconds = 0.0
    """How long what waits before it takes, as far as is known."""


class ClientGone(AdapterdError):
    """The client closed the connection before the answer was there."""

    status = 499
    type = "invalid_request_error"
    code = "client_closed_request"


class StoreUnavailable(AdapterdError):
    """The store did not answer, or answered with a failure."""

    status = 503
    type = "unavailable_error"
    code = "store_unavailable"
    retry_after = 2


class IssuerUnavailable(AdapterdError):
    """The keys of the tokens' issuer cannot be had, so that nobody can tell whether a token is good."""

    status = 503
    type = "unavailable_error"
    code = "issuer_unavailable"
    retry_after = 15


class MemoryFull(AdapterdError):
    """An adapter has to wait for others that are in use."""

    status = 503
    type = "unavailable_error"
    code = "memory_full"
    retry_after = 1


class OverBudget(AdapterdError):
    """An adapter, or what is pinned, is larger than the memory that adapters may take."""

    status = 507
    code = "over_memory_budget"


class WarmingUp(AdapterdError):
    """Not everything that a request takes has been run yet."""

    status = 503
    type = "unavailable_error"
    code = "warming_up"
    fault = False
    retry_after = 1


class ShuttingDown(AdapterdError):
    """The server is on its way out; another replica will answer."""

    status = 503
    type = "unavailable_error"
    code = "shutting_down"
    fault = False
    retry_after = 5


class DeviceStopped(AdapterdError):
    """A thread that owns the device has died."""

    status = 503
    type = "unavailable_error"
    code = "device_stopped"


class AdapterQuarantined(AdapterdError):
    """An adapter has failed on the device again and again, and is left out for a while."""

    status = 503
    type = "unavailable_error"
    code = "adapter_quarantined"


class DeadlineExceeded(AdapterdError):
    """The answer was not there when the request's time was over."""

    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"
    fault = False


class CorruptVersion(AdapterdError):
    """The bytes of a stored version do not match the digest that names it."""

    code = "corrupt_version"


class NotFiniteOutput(AdapterdError):
    """An adapter's outputs for a text are NaN or infinite."""

    code = "not_finite_output"


class UnservableAdapter(AdapterdError):
    """A stored adapter does not fit this server's backbone."""

    code = "unservable_adapter"


class BadConfiguration(AdapterdError):
    """Keys or settings that make no sense."""

    code = "bad_configuration"


class BackboneError(AdapterdError):
    """The backbone cannot be loaded, or cannot be served in batches."""

    code = "backbone_error"
