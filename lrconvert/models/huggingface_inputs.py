"""What a model of transformers is called with, read from its configuration."""

from typing import Any

from lrconvert.inputs import Input, Inputs

# Tokens in one example, where the model takes as many; MACs are counted for this length.
TOKENS = 128
# Samples of sound in one example: a second at the rate of most models of speech.
_SAMPLES = 16_000


def inputs_of(kind: Any, config: Any) -> Inputs | None:
    """The inputs of one call of the class `kind` with the configuration `config`; None where they are not known."""
    text, vision = getattr(config, "text_config", None), getattr(config, "vision_config", None)
    main = kind.main_input_name
    if text is not None and vision is not None:
        return _both(text, vision) if hasattr(config, "projection_dim") else None
    if main == "pixel_values":
        return _pixels(vision or config)
    if main == "input_features":
        return _spectrogram(kind, config)
    if main == "input_values":
        sound = _sound(config)
        return (Input(sound, "input_values", length="samples" if len(sound) == 1 else None),)
    return _tokens(kind, text or config) if main == "input_ids" else None


def _both(text: Any, vision: Any) -> Inputs | None:
    """Two towers, as CLIP has them: a text for every image."""
    pixels, vocabulary = _pixels(vision), _vocabulary(text)
    return None if pixels is None or vocabulary is None else (_ids("input_ids", vocabulary, _length(text)), *pixels)


def _tokens(kind: Any, config: Any) -> Inputs | None:
    vocabulary = _vocabulary(config)
    if vocabulary is None:
        return None
    length = _length(config)
    ids = (_ids("input_ids", vocabulary, length), Input((length,), "attention_mask", "mask", length="tokens"))
    if getattr(config, "is_encoder_decoder", False) and not kind.__name__.endswith("EncoderModel"):
        return (*ids, _ids("decoder_input_ids", vocabulary, length))
    return ids


def _pixels(config: Any) -> Inputs | None:
    channels, size = getattr(config, "num_channels", 3), getattr(config, "image_size", None)
    if size is None:
        # Convolutional networks take any; 224 is what they were nearly all trained on.
        size = 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    image = (int(channels), int(height), int(width))
    frames = getattr(config, "num_frames", None)
    return (Input(image if frames is None else (int(frames), *image), "pixel_values"),)


def _sound(config: Any) -> tuple[int, ...]:
    """A second of it; with its channels where the model takes several, or the spectrogram where it takes that."""
    frames, bins = getattr(config, "max_length", None), getattr(config, "num_mel_bins", None)
    if isinstance(frames, int) and isinstance(bins, int):
        return frames, bins
    channels = getattr(config, "audio_channels", None)
    return (_SAMPLES,) if channels is None else (int(channels), _SAMPLES)


def _spectrogram(kind: Any, config: Any) -> Inputs | None:
    """Whisper's: twice as many frames as positions, which the second convolution halves."""
    bins, positions = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
    vocabulary = _vocabulary(config)
    width = getattr(config, "feature_projection_input_dim", None)
    if isinstance(width, int):  # Wav2Vec2-BERT's: frames, each of several bins
        return (Input((TOKENS, width), "input_features", length="frames"),)
    if bins is None or positions is None or vocabulary is None:
        return None
    features = Input((int(bins), 2 * int(positions)), "input_features")
    if getattr(config, "is_encoder_decoder", False) and hasattr(config, "max_target_positions"):
        length = min(TOKENS, int(config.max_target_positions))
        return (features, _ids("decoder_input_ids", vocabulary, length))
    return (features,)


def _ids(name: str, vocabulary: int, length: int) -> Input:
    return Input((length,), name, "index", high=vocabulary, length=name.replace("input_ids", "tokens"))


def _vocabulary(config: Any) -> int | None:
    size = getattr(config, "vocab_size", None)
    return size if isinstance(size, int) else None


def positions_of(config: Any) -> int | None:
    """Tokens that the model takes at most; None where its configuration sets no limit."""
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    # RoBERTa numbers positions from the one after its padding.
    offset = (getattr(config, "pad_token_id", None) or 0) + 1 if getattr(config, "model_type", "") == "roberta" else 0
    return positions - offset if isinstance(positions, int) else None


def _length(config: Any) -> int:
    """Tokens that the model takes, up to `TOKENS`."""
    positions = positions_of(config)
    return TOKENS if positions is None else min(TOKENS, positions)
