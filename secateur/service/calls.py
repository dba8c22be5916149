"""What interceptors share: handlers wrapped around handlers."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc


def rebuilt(handler: Any, single: Callable[..., Any], streaming: Callable[..., Any]) -> Any:
    """A method's handler whose behaviour is run by others.

    Args:
        handler: of grpc.
        single: called with (behaviour, request, context) where there is one response.
        streaming: the same where there are many.
    """
    make = getattr(
        grpc,
        f"{'stream' if handler.request_streaming else 'unary'}_"
        f"{'stream' if handler.response_streaming else 'unary'}_rpc_method_handler",
    )
    wrap, behaviour = (
        (streaming, handler.unary_stream or handler.stream_stream)
        if handler.response_streaming
        else (single, handler.unary_unary or handler.stream_unary)
    )
    return make(
        functools.partial(wrap, behaviour),
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )


def wrapped(handler: Any, enter: Callable[[Any], None]) -> Any:
    """A method's handler that calls `enter` with the call's context first."""

    async def single(behaviour: Any, request: Any, context: Any) -> Any:
        enter(context)
        return await behaviour(request, context)

    async def streaming(behaviour: Any, request: Any, context: Any) -> AsyncIterator[Any]:
        enter(context)
        async for response in behaviour(request, context):
            yield response

    return rebuilt(handler, single, streaming)
