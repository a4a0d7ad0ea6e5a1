"""The signature of a kernel, checked with ``kernels.verify`` when the kernel was just fetched."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from twinkle.errors import SourceError

if TYPE_CHECKING:
    from pathlib import Path

    from twinkle.sources.hub.request import HubRequest

__all__ = ["signature_note"]

_BUNDLE = "metadata.json.sigstore"


def signature_note(variant_dir: Path, request: HubRequest) -> str | None:
    """Verify the signature of a variant: a note for the report, or ``None`` where it is not signed.

    A signature by someone whom ``kernels`` does not know is worth a remark: its list has one publisher.
    A signature that is not valid, or files that are not the signed ones, are refused.

    Raises:
        SourceError: The signature or a signed digest is wrong.
    """
    if not (variant_dir / _BUNDLE).is_file():
        return None
    try:
        verify: Any = importlib.import_module("kernels.verify")
    except ImportError as error:
        return f"signed; the installed `kernels` cannot check it ({error})"
    try:
        result = verify.verify_variant(variant_dir)
        if _kind(result) == "SignatureVerificationFailure":
            anyone = importlib.import_module("sigstore.verify.policy").UnsafeNoOp()
            if _kind(verify.verify_variant(variant_dir, policies=[anyone])) == "Success":
                return f"signed, not by one of the signers that `kernels` knows: {result.reason}"
    except Exception as error:
        # The list of valid keys comes from the network, which may be down or closed.
        return f"signed; the signature could not be checked ({type(error).__name__}: {error})"
    if _kind(result) == "Success":
        return "signed, and the signature is right"
    raise SourceError(
        f"{request} has a wrong signature, and nothing of it was loaded",
        where=request.where,
        found=f"{_kind(result)}: {getattr(result, 'reason', getattr(result, 'violations', ''))}",
        fix="do not use this build; tell its publisher",
    )


def _kind(result: object) -> str:
    return type(result).__name__
