"""Values, arguments and errors as JSON bytes, and back, typed by annotations. Pure.

`codec` is the door; `typed` finds the plan for an annotation, the others make plans by subject.
"""

from kagzi.codec.codec import MAX_PAYLOAD_BYTES, ArgumentsCodec, Codec, codec_for

__all__ = ["MAX_PAYLOAD_BYTES", "ArgumentsCodec", "Codec", "codec_for"]
