"""What a picture costs, from its size alone: tokens, FLOPs, bytes, and seconds where known.

``plan_image`` counts one picture, ``plan_request`` everything a question about it takes, and
``check_budget`` refuses what does not fit. The arithmetic is in ``cost.py``.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from edge_vlm.bundle.manifest import DECODER_NAME, VISION_NAME, Manifest
from edge_vlm.errors import InputError
from edge_vlm.families.base import family_of
from edge_vlm.families.sizes import Decoder, Vision, VisionWork, decoder_flops
from edge_vlm.machine.engine_settings import FLASH_ROWS, KV_TYPES, SCORES_BATCH, flash_mode
from edge_vlm.planning import cost
from edge_vlm.planning.budget import context_size, limit_tiles

if TYPE_CHECKING:
    from edge_vlm.families.base import ImageProcessor
    from edge_vlm.planning.speeds import Speeds

RESIDENCIES = ("together", "in-turns")
QUESTION_TOKENS = 32  # of a chat template with a short question


@dataclass(frozen=True)
class ModelSizes:
    """A model as the planner sees it; file sizes in bytes.

    ``parsed_bytes`` is ``vision.onnx`` without its data file: onnxruntime keeps what it parsed, and
    maps the rest.
    """

    processor: ImageProcessor
    vision: Vision
    vision_bytes: int
    parsed_bytes: int
    decoder: Decoder
    decoder_bytes: int

    @classmethod
    def of(cls, manifest: Manifest) -> ModelSizes:
        """A bundle's: what is not the decoder belongs to the vision graph."""
        files = {name: record.size for name, record in manifest.files.items()}
        decoder_bytes = files.pop(DECODER_NAME)
        return cls(
            processor=manifest.image_processor,
            vision=manifest.vision,
            vision_bytes=sum(files.values()),
            parsed_bytes=files[VISION_NAME],
            decoder=manifest.decoder,
            decoder_bytes=decoder_bytes,
        )

    @property
    def work(self) -> VisionWork:
        """What one crop costs in the vision graph."""
        return family_of(self.processor).work(self.processor, self.vision)


@dataclass(frozen=True)
class RequestSettings:
    """What the planner has to know about the request and the engines.

    Raises:
        InputError: a value is none of those that exist.
    """

    question_tokens: int = QUESTION_TOKENS  # of the prompt, besides the picture
    answer_tokens: int = 512  # room for them is made before the answer begins
    kv_type: str = "f16"
    kv_budget: int | None = None  # bytes
    batch_size: int = 512
    flash_attention: str = "prefill"  # off, on or prefill; on with a quantized KV cache
    repack: bool = False  # let llama.cpp interleave matrices
    mmap: bool = True
    # What is mapped is in memory once it is read, and not beside its interleaved copy: on Linux.
    on_demand: bool = True
    residency: str = "together"  # or in-turns: the vision session is released before the decoder
    tiles_per_call: int = 1
    vision_streams: int = 2
    processor_family: str = "x86"  # or arm; decides what is repacked

    def __post_init__(self) -> None:
        for name, known in (
            ("kv_type", tuple(KV_TYPES)),
            ("residency", RESIDENCIES),
            ("flash_attention", ("off", "on", "prefill")),
            ("processor_family", tuple(cost.REPACKED)),
        ):
            if getattr(self, name) not in known:
                raise InputError(f"{name}: must be one of {', '.join(known)}")


@dataclass(frozen=True)
class Flops:
    """Floating-point operations by stage; ``decode`` is one token behind the whole prompt."""

    vision: int
    connector: int
    prefill: int
    decode: int


@dataclass(frozen=True)
class Memory:
    """Bytes by component; ``peak`` is what the process needs at its largest.

    ``decoder_weights`` are those in memory while it answers. ``prompt_kv_cache`` and
    ``prompt_buffers`` are those of a prompt's own context, see ``flash_attention`` of
    ``EngineSettings``, and are gone then.
    """

    python: int
    picture: int  # pixels, crops and embeddings
    vision_weights: int
    onnxruntime_arena: int
    decoder_weights: int
    token_table: int  # in memory only while the decoder is loaded
    head: int  # part of the weights: in memory only from the first token on
    repacked_weights: int  # copies, where the file's own matrices stay in memory too
    held_weights: int  # part of the decoder's: in memory from loading on, not when they are read
    kv_cache: int
    compute_buffers: int
    prompt_kv_cache: int
    prompt_buffers: int
    residency: str

    @property
    def peak(self) -> int:
        """Peak resident bytes."""
        weights = self.decoder_weights + self.repacked_weights
        encoding = self.vision_weights + self.onnxruntime_arena
        prompt = self.prompt_kv_cache + self.prompt_buffers
        prefilling = weights - self.head + self.kv_cache + prompt
        answering = weights + self.kv_cache + self.compute_buffers
        loading = weights + self.token_table
        if self.residency == "together":
            encoding += self.held_weights
            prefilling += self.vision_weights
            answering += self.vision_weights
        return self.python + self.picture + max(loading, encoding, prefilling, answering)


@dataclass(frozen=True)
class Seconds:
    """Predicted wall time; ``per_token`` of the answer."""

    load: float
    vision: float
    prefill: float
    per_token: float

    @property
    def first_token(self) -> float:
        """From a loaded model to the first token."""
        return self.vision + self.prefill + self.per_token


@dataclass(frozen=True)
class ImagePlan:
    """Sizes and counts for one picture; sizes are (width, height) in pixels."""

    size: tuple[int, int]
    resized: tuple[int, int]
    tiling: tuple[int, int]  # rows, columns
    crops: int
    image_tokens: int
    kv_bytes: int  # of those tokens
    reduced: bool  # whether the model sees fewer pixels than the picture has


def plan_image(
    width: int, height: int, processor: ImageProcessor, decoder: Decoder, kv_type: str = "f16"
) -> ImagePlan:
    """Plan one picture.

    Raises:
        ImageError: the aspect ratio is not supported.
    """
    plan = family_of(processor).layout(width, height, processor)
    tokens = plan.n_tokens
    return ImagePlan(
        size=(width, height),
        resized=(plan.resized_hw[1], plan.resized_hw[0]),
        tiling=plan.tiling,
        crops=plan.n_crops,
        image_tokens=tokens,
        kv_bytes=tokens * decoder.kv_bytes_per_token(KV_TYPES[kv_type]),
        reduced=plan.is_reduced,
    )


@dataclass(frozen=True)
class RequestPlan:
    """All that one question about one picture takes."""

    image: ImagePlan
    prompt_tokens: int
    context: int  # positions allocated in the KV cache
    flops: Flops
    memory: Memory
    seconds: Seconds | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the picture's own figures first, ``kv_bytes`` among them."""
        own = asdict(self)
        image = own.pop("image")
        own["memory"]["peak"] = self.memory.peak
        if self.seconds:
            own["seconds"]["first_token"] = self.seconds.first_token
        return {**image, **own}


def plan_request(
    model: ModelSizes,
    width: int,
    height: int,
    settings: RequestSettings | None = None,
    *,
    max_tiles: int | None = None,
    speeds: Speeds | None = None,
) -> RequestPlan:
    """Plan one question about a picture of ``width`` x ``height`` pixels.

    ``max_tiles`` limits the tiles besides the thumbnail; without ``speeds``, which may be measured
    or estimated, ``seconds`` is None.

    Raises:
        ImageError: the aspect ratio is not supported.
    """
    settings = settings or RequestSettings()
    processor, decoder = limit_tiles(model.processor, max_tiles), model.decoder
    family = family_of(processor)
    work = family.picture_work(family.layout(width, height, processor), processor, model.vision)
    image = plan_image(width, height, processor, decoder, settings.kv_type)
    n_tiles = image.crops * work.flops / model.work.flops  # as ``speeds`` count them
    prompt = image.image_tokens + settings.question_tokens
    context = context_size(min(prompt + settings.answer_tokens, decoder.max_sequence_length))
    return RequestPlan(
        image=image,
        prompt_tokens=prompt,
        context=context,
        flops=Flops(
            vision=image.crops * work.tower_flops,
            connector=image.crops * work.connector_flops,
            prefill=decoder_flops(decoder, prompt),
            decode=decoder_flops(decoder, 1, prompt),
        ),
        memory=_memory(model, processor, image, work, context, settings),
        seconds=_predict(model, n_tiles, prompt, settings.kv_type, speeds) if speeds else None,
    )


def _memory(
    model: ModelSizes,
    processor: ImageProcessor,
    image: ImagePlan,
    work: VisionWork,
    context: int,
    settings: RequestSettings,
) -> Memory:
    """Of a request with one picture and ``context`` positions."""
    decoder = model.decoder
    width, height = image.size
    n_vectors = image.crops * processor.tokens_per_crop
    if processor.any_size:
        n_vectors = image.image_tokens
    crop_bytes = 4 * math.prod(processor.crop_shape) * n_vectors // processor.tokens_per_crop
    decoder_weights, table, head, copies, held = _weights(model, settings)
    mode = flash_mode(settings.flash_attention, settings.kv_type, settings.batch_size)
    own, own_buffers, batch = 0, 0, settings.batch_size
    if mode == "prefill":
        own = _prompt_kv_bytes(decoder, settings, context, image.image_tokens)
        own_context = context_size(image.image_tokens)
        own_buffers = _buffers(decoder, settings, own_context, batch, True) if own else 0
        batch = min(batch, SCORES_BATCH)
    vector_bytes = 4 * n_vectors * decoder.hidden_size
    return Memory(
        python=cost.PYTHON_BYTES,
        # Vectors twice: as encoded, and in the order of the prompt.
        picture=3 * width * height + crop_bytes + 2 * vector_bytes,
        vision_weights=model.parsed_bytes
        + round(model.vision_bytes * cost.VISION_GROWTH.get(model.vision.precision, 1.0)),
        onnxruntime_arena=cost.arena_bytes(
            work.live_bytes,
            min(settings.tiles_per_call, image.crops),
            min(image.crops, settings.vision_streams + image.crops % settings.vision_streams),
        ),
        decoder_weights=decoder_weights,
        token_table=table,
        head=head,
        repacked_weights=copies,
        held_weights=held,
        kv_cache=cost.kv_bytes(decoder, context, settings.kv_type),
        compute_buffers=_buffers(decoder, settings, context, batch, mode == "on"),
        prompt_kv_cache=own,
        prompt_buffers=own_buffers,
        residency=settings.residency,
    )


def _weights(model: ModelSizes, settings: RequestSettings) -> tuple[int, int, int, int, int]:
    """Bytes of a ``Memory``: decoder's weights, token table, head, copies, those that are held."""
    decoder, family = model.decoder, settings.processor_family
    repacked = cost.repacked_bytes(decoder, decoder.precision, family) if settings.repack else 0
    if not (settings.mmap and settings.on_demand):
        copies = repacked if settings.mmap else 0
        return model.decoder_bytes, 0, 0, copies, model.decoder_bytes + copies
    table, head = 0, 0
    if not decoder.tied_head:
        (_, table), (kind, head) = cost.table_and_head(decoder, decoder.precision)
        if repacked and kind in cost.REPACKED[family]:
            head = 0  # not mapped
    return model.decoder_bytes - table, table, head, 0, repacked


def _buffers(
    decoder: Decoder, settings: RequestSettings, n_context: int, batch_size: int, flash: bool
) -> int:
    return cost.compute_bytes(
        decoder, n_context, batch_size, settings.kv_type, flash
    ) + cost.work_bytes(decoder, n_context, batch_size, flash)


def _prompt_kv_bytes(
    decoder: Decoder, settings: RequestSettings, context: int, image_tokens: int
) -> int:
    """Bytes of the KV cache that a picture is prefilled in, if that is not the answer's."""
    if image_tokens < FLASH_ROWS:
        return 0
    own = cost.kv_bytes(decoder, image_tokens, settings.kv_type)
    both = own + cost.kv_bytes(decoder, context, settings.kv_type)
    return own if settings.kv_budget is None or both <= settings.kv_budget else 0


def _predict(
    model: ModelSizes, n_tiles: float, n_prompt: int, kv_type: str, speeds: Speeds
) -> Seconds:
    """Scale measured speeds to this request.

    Prefill is bound by arithmetic and goes with the FLOPs, whose attention part grows with the
    square of the length; decode is bound by memory and goes with the bytes read for a token.
    """

    def bytes_read(n_positions: int) -> float:
        per_position = model.decoder.kv_bytes_per_token(KV_TYPES[kv_type])
        return model.decoder_bytes + n_positions * per_position

    rate, measured = speeds.prefill_tokens_per_second, speeds.prefill_tokens
    if kv_type.startswith("q"):
        rate = speeds.quantized_prefill_tokens_per_second or rate
    work = decoder_flops(model.decoder, n_prompt) / decoder_flops(model.decoder, measured)
    slower = bytes_read(n_prompt) / bytes_read(speeds.decode_positions)
    return Seconds(
        load=speeds.load_seconds,
        vision=n_tiles * speeds.vision_seconds_per_tile,
        prefill=work * measured / rate,
        per_token=slower / speeds.decode_tokens_per_second,
    )
