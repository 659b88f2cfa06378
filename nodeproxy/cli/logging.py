"""Owns the form of log lines: text or JSON, on standard error, as verbose as asked for."""

from __future__ import annotations

import logging
import sys

import structlog


def configure_logging(verbosity: int, log_format: str, *, for_good: bool = False) -> None:
    """`verbosity` as kube-proxy's -v: from 4 on debug lines are shown. `log_format` is text or json.

    `for_good`: this process is an agent's, and nobody will configure logging again; a line then costs less.
    """
    level = logging.DEBUG if verbosity >= 4 else logging.INFO
    if log_format == "json":
        renderer: structlog.typing.Processor = structlog.processors.JSONRenderer()
    else:
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=for_good,
    )
