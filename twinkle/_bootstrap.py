"""What every door and the API call. Standard library only, and nothing that is not needed to start."""

from __future__ import annotations

import os
import sys

from twinkle._environment import asking, switched_off, variables

TYPE_CHECKING = False
if TYPE_CHECKING:
    from twinkle.config import Settings

__all__ = ["activate", "report_at_exit", "settle"]

# Doors that a user did not type: a bad configuration there must not stop the program.
_INJECTED = ("pth", "sitecustomize")


class _Settled:
    """The variables that :func:`settle` has read."""

    def __init__(self) -> None:
        self.read: dict[str, str] | None = None
        self.refused = False  # a door said why it stays shut


def activate(config: str | None = None, *, door: str = "api") -> Settings | None:
    """Read the configuration, register what it asks for and watch for its targets.

    Args:
        config: A path, several joined by the path separator, or ``"auto"``; ``TWINKLE_CONFIG``
            when not given, and ``"auto"`` when that is not set either.
        door: Who calls: ``api``, ``run``, ``pth`` or ``sitecustomize``.

    Returns:
        The settings in force; ``None`` when Twinkle is switched off, when an injected door met a bad
        configuration (which it says on stderr), or when no variable asks it for kernels.

    Raises:
        ConfigError: The configuration cannot be right; nothing was registered.
    """
    environ = variables()
    if switched_off(environ):
        return None
    wanted = config if config is not None else environ.get("TWINKLE_CONFIG") or "auto"
    from twinkle.errors import TwinkleError, say

    try:
        if door in _INJECTED and not asking(environ):  # a report, and no kernel
            settle()
            return None
        return _activate(wanted, door)
    except TwinkleError as error:
        if door not in _INJECTED:
            raise
        from twinkle.runtime import runtime

        runtime.of(_Settled).refused = True
        say(f"twinkle is not active, the program runs as it is: {error}")
        return None


def settle() -> bool:
    """Bring the ``TWINKLE_`` variables into force for a program that calls the API and opened no door.

    They are read again when they have changed. What they say of kernels to register is no part of it.

    Returns:
        Whether kernels may be put in place: false where Twinkle is switched off.

    Raises:
        ConfigError: A variable cannot be right.
    """
    environ = variables()
    if switched_off(environ):
        return False
    from twinkle.runtime import runtime

    given = {name: text for name, text in environ.items() if name.startswith("TWINKLE_")}
    state = runtime.of(_Settled)
    if given != state.read:
        from twinkle import config

        # Not imported for the question: twelve modules, for programs that only want a report.
        activation = sys.modules.get("twinkle.apply.activation")
        if activation is None or not runtime.of(activation.Activation).settings:  # else a door has read them
            asked = asking(given)
            settings = config.load(["auto"], {name: given[name] for name in given if name not in asked})
            runtime.options.take(settings, given=settings.origins)
            if asked and not state.refused:
                settings.warnings.append(
                    f"{', '.join(asked)} asks for kernels, and no door of Twinkle opened in this program: "
                    "start it with `twinkle run`, or call twinkle.activate()"
                )
            _tell(settings)
        state.read = given
    return True


def _activate(wanted: str, door: str) -> Settings:
    from twinkle import config
    from twinkle.apply.activation import Activation, start
    from twinkle.runtime import runtime

    active = runtime.of(Activation).settings
    if door in _INJECTED and active:
        return next(iter(active.values()))  # a second injected door found the same environment
    if wanted not in active:
        settings = config.load([path for path in wanted.split(os.pathsep) if path], variables())
        start(settings, door=door)
        active[wanted] = settings
        _tell(settings)
    return active[wanted]


def _tell(settings: Settings) -> None:
    """Say what is odd about the settings, and arrange for the report."""
    from twinkle.errors import say
    from twinkle.runtime import runtime

    for warning in settings.warnings:
        if settings.log != "off" and warning not in runtime.session.remarks:
            say(f"twinkle: {warning}")
        runtime.session.remark(warning)
    report_at_exit(text=settings.log in ("info", "debug"), idle=settings.log != "off", path=settings.report)


def report_at_exit(*, text: bool = False, idle: bool = False, path: str | None = None) -> None:
    """Say when this process ends what became of the bindings, and write it whenever that changes.

    The first process of a job speaks for all of it; ``docs/report.md`` has the files of the others.

    Args:
        text: Print the report as a table.
        idle: Name the bindings of the user's that did nothing.
        path: Write the report there as JSON.
    """
    from twinkle.runtime import runtime
    from twinkle.session import JOB, Ends

    session = runtime.session
    first = session.ends is None
    ends = session.ends = session.ends or Ends()
    ends.text, ends.idle, ends.path = ends.text or text, ends.idle or idle, path or ends.path
    if not first:
        return
    import atexit
    import time

    pid = os.getpid()
    os.environ.setdefault(JOB, f"{pid}-{time.time_ns() // 1000000}")

    def at_exit() -> None:
        here = os.getpid() == pid and runtime.session is session  # not in a forked child
        said = here and (ends.has_to_be_said or runtime.options.strict or not session.door)
        if said or (here and _waits_in_program()):
            from twinkle.report import exit

            exit.at_exit(ends)

    def changed() -> None:
        # A program that only calls the API has a catalogue: what its children take of it is theirs to know.
        if runtime.session is session and (ends.path is not None or session.door):
            from twinkle.report import exit

            exit.changed(ends)

    runtime.registry.on_change = changed
    atexit.register(at_exit)


def _waits_in_program() -> bool:
    """Whether a function of the program itself has a kernel and waits for torch: its own, so it is said."""
    from twinkle.runtime import runtime

    functions = [binding for binding in runtime.registry.bindings if binding.scope == "function"]
    if not functions:
        return False
    from twinkle.report.idle import waits_in_program

    return any(map(waits_in_program, functions))
