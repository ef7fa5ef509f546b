"""IDEFICS as a whole: images and token ids in, logits (and a loss) out.

Our own classes over `transformers.PreTrainedModel`, `GenerationMixin` and `IdeficsConfig`, with the checkpoints'
names, so that loading, saving, `device_map`, gradient checkpointing, PEFT and `generate()` are the library's work.
There is one forward pass over the layers, `IdeficsModel.decode`; the memory it is given decides what a token sees.
"""

# Annotations stay objects here: that of `forward`'s **kwargs is how transformers learns what a model can be asked for.

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from transformers import IdeficsConfig, PreTrainedModel, initialization
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import ModelOutput
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from idefics_cli.model.decoder import (
    IdeficsAttention,
    IdeficsDecoderLayer,
    IdeficsDecoupledEmbedding,
    IdeficsGatedCrossAttentionLayer,
    IdeficsRMSNorm,
    IdeficsRotaryEmbedding,
    initial_alpha,
)
from idefics_cli.model.kv_interface import Memory, PlainMemory, device_of, image_visibility
from idefics_cli.model.packed_linear import IdeficsDecoupledLinear
from idefics_cli.model.perceiver import IdeficsPerceiverResampler
from idefics_cli.model.vision import IdeficsVisionEmbeddings, IdeficsVisionTransformer
from idefics_cli.ranks import Ranks

IMAGE_INPUTS = ("pixel_values", "image_encoder_embeddings", "perceiver_embeddings")


@dataclass
class IdeficsOutput(ModelOutput):
    """What both models return. `IdeficsModel` sets `last_hidden_state` (rows, tokens, hidden), the model with a head
    `logits` (rows, tokens, both vocabularies) and, with labels, the scalar `loss`. `image_hidden_states` (rows, images,
    seq, dim) may be passed again. Fields that are None are left out.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None


def freeze_model(model: nn.Module, module_exceptions: Sequence[str] = ()) -> nn.Module:
    """Switch gradients off for all of `model` but modules of the named kinds: LayerNorm, Linear, Embedding."""
    kinds = {"LayerNorm": nn.LayerNorm, "Linear": nn.Linear, "Embedding": nn.Embedding}
    unknown = sorted(set(module_exceptions) - set(kinds))
    if unknown:
        raise ValueError(f"cannot except {', '.join(unknown)} from freezing: use {', '.join(kinds)}")
    exceptions = tuple(kinds[name] for name in module_exceptions)
    for module in model.modules():  # parents come before their children, so an exception below a frozen parent holds
        module.requires_grad_(isinstance(module, exceptions))
    return model


class IdeficsPreTrainedModel(PreTrainedModel):
    """What transformers must know of these classes: how to load, split, initialise and record them."""

    config_class = IdeficsConfig
    config: IdeficsConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = [  # noqa: RUF012
        *("IdeficsDecoderLayer", "IdeficsGatedCrossAttentionLayer", "IdeficsDecoupledEmbedding"),
        *("IdeficsDecoupledLinear", "IdeficsVisionEmbeddings", "IdeficsVisionEncoderLayer"),
        "IdeficsPerceiverResampler",
    ]
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    # Buffers that checkpoints of 2023 carry and that are computed today.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$", r"embeddings\.position_ids$"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = False
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": IdeficsDecoderLayer,
        "attentions": OutputRecorder(IdeficsAttention, index=1, layer_name="self_attn"),
    }

    @property
    def device(self) -> torch.device:
        """Where inputs come in and outputs come out."""
        return device_of(self, super().device)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, IdeficsVisionEmbeddings):
            initialization.normal_(module.class_embedding)
        elif isinstance(module, IdeficsPerceiverResampler):
            initialization.normal_(module.latents)
        elif isinstance(module, IdeficsGatedCrossAttentionLayer):
            for alpha in (module.alpha_cross_attn, module.alpha_dense):
                initialization.copy_(alpha, initial_alpha(self.config))


class IdeficsModel(IdeficsPreTrainedModel):
    """Vision tower, resampler and decoder, without the head."""

    def __init__(self, config: IdeficsConfig):
        super().__init__(config)
        self.embed_tokens = IdeficsDecoupledEmbedding(
            num_embeddings=config.vocab_size,
            num_additional_embeddings=config.additional_vocab_size,
            embedding_dim=config.hidden_size,
            partially_freeze=config.freeze_text_layers,
            padding_idx=config.pad_token_id,
        )
        # The vision tower is not a PreTrainedModel: it is told here which attention to use.
        config.vision_config._attn_implementation = config._attn_implementation
        self.vision_model = IdeficsVisionTransformer(config.vision_config)
        if config.use_resampler:
            self.perceiver_resampler = IdeficsPerceiverResampler(config)
        self.layers = nn.ModuleList(IdeficsDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        num_gated_layers = -(-config.num_hidden_layers // config.cross_layer_interval)
        self.gated_cross_attn_layers = nn.ModuleList(
            IdeficsGatedCrossAttentionLayer(config, index) for index in range(num_gated_layers)
        )
        self.norm = IdeficsRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = IdeficsRotaryEmbedding(config)
        self.gradient_checkpointing = False  # True: `merge_with_config_defaults` switches the cache off
        self.post_init()
        self.freeze_relevant_params()

    def freeze_relevant_params(self, config: IdeficsConfig | None = None) -> None:
        """Freeze what the configuration says."""
        config = config or self.config
        if config.freeze_text_layers:
            self.freeze_text_layers(config.freeze_text_module_exceptions)
        if config.freeze_vision_layers:
            self.freeze_vision_layers(config.freeze_vision_module_exceptions)

    def freeze_text_layers(self, module_exceptions: Sequence[str] = ()) -> None:
        for module in (self.layers, self.norm):
            freeze_model(module, module_exceptions)

    def freeze_vision_layers(self, module_exceptions: Sequence[str] = ()) -> None:
        freeze_model(self.vision_model, module_exceptions)

    def encode_images(
        self,
        pixel_values: Tensor | None = None,
        image_encoder_embeddings: Tensor | None = None,
        perceiver_embeddings: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> Tensor:
        """Exactly one of pixels (rows, images, 3, height, width), vision output (rows, images, patches, dim) and
        latents (rows, images, latents, dim) -> what cross-attention reads, (rows, images, seq, dim).
        """
        given = [pixel_values, image_encoder_embeddings, perceiver_embeddings]
        if sum(value is not None for value in given) != 1:
            raise ValueError(
                "Exactly 1 of pixel_values, image_encoder_embeddings or perceiver_embeddings has to be not-None."
            )
        if perceiver_embeddings is not None:
            if not self.config.use_resampler:
                raise ValueError("If `perceiver_embeddings` are passed, use_resampler should be True")
            return perceiver_embeddings.to(self.dtype)
        images = pixel_values if pixel_values is not None else image_encoder_embeddings
        rows_and_images = images.shape[:2]
        hidden_states = images.flatten(0, 1).to(self.dtype)  # (rows * images, ...)
        if pixel_values is not None:
            hidden_states = self.vision_model(hidden_states, interpolate_pos_encoding).last_hidden_state
        if self.config.use_resampler:
            hidden_states = self.perceiver_resampler(hidden_states)
        return hidden_states.unflatten(0, rows_and_images)

    def padded_length(self, num_tokens: int) -> int:
        """How many tokens to give `decode` so that it copies nothing: `num_tokens`, or a few more of padding."""
        joint = getattr(self.layers[0].mlp.down_proj, "joint", None)
        return num_tokens if joint is None else joint.padded_rows(num_tokens)

    def decode(
        self, hidden_states: Tensor, position_ids: Tensor, memory: Memory, image_hidden_states: Tensor | None = None
    ) -> Tensor:
        """The one pass over the layers: (rows, tokens, hidden) -> the same, normalised.

        `position_ids` (rows or 1, tokens); `image_hidden_states` (rows, images * seq, dim), or None where the memory
        holds the images' keys and values.
        """
        device = hidden_states.device
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        interval = self.config.cross_layer_interval
        for index, layer in enumerate(self.layers):
            if index % interval == 0:
                gated_layer = self.gated_cross_attn_layers[index // interval]
                hidden_states = gated_layer(hidden_states, image_hidden_states, memory)
            hidden_states = layer(hidden_states, memory, position_embeddings)
        return self.norm(hidden_states).to(device)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_encoder_embeddings: Tensor | None = None,
        perceiver_embeddings: Tensor | None = None,
        image_attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> IdeficsOutput:
        """`input_ids` (rows, tokens) or `inputs_embeds`; `attention_mask` (rows, past + tokens), 0 on padding;
        `image_attention_mask` (rows, tokens, images), 1 where a token sees an image; one input of `encode_images`.
        `output_hidden_states` and `output_attentions` are the decorators' work.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if image_attention_mask is None:
            raise ValueError("image_attention_mask (rows, tokens, images) is required: which image a token sees")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = positions(attention_mask, inputs_embeds, past_length)
        image_hidden_states = self.encode_images(
            pixel_values, image_encoder_embeddings, perceiver_embeddings, interpolate_pos_encoding
        )  # (rows, images, seq, dim)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        image_mask, image_gate = image_visibility(
            image_attention_mask.to(inputs_embeds.device), image_hidden_states.shape[2], inputs_embeds.dtype
        )
        attention = self.config._attn_implementation
        memory = PlainMemory(attention, causal_mask, image_mask, image_gate, past_key_values)
        last_hidden_state = self.decode(inputs_embeds, position_ids, memory, image_hidden_states.flatten(1, 2))
        return IdeficsOutput(
            last_hidden_state=last_hidden_state,
            past_key_values=past_key_values,
            image_hidden_states=image_hidden_states,
        )


def positions(attention_mask: Tensor | None, inputs_embeds: Tensor, past_length: int) -> Tensor:
    """(rows or 1, tokens): a token's place among the unmasked ones of its row; padding gets 1, as in transformers."""
    num_tokens, device = inputs_embeds.shape[1], inputs_embeds.device
    if attention_mask is None:
        return torch.arange(past_length, past_length + num_tokens, device=device).unsqueeze(0)
    position_ids = attention_mask.long().cumsum(-1) - 1
    return position_ids.masked_fill(attention_mask == 0, 1)[:, -num_tokens:]


class IdeficsForVisionText2Text(IdeficsPreTrainedModel, GenerationMixin):
    """The model with its head: a drop-in for the class of the same name in transformers."""

    ranks: Ranks | None = None  # the processes that it is split over
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: IdeficsConfig):
        super().__init__(config)
        self.model = IdeficsModel(config)
        self.lm_head = IdeficsDecoupledLinear(
            in_features=config.hidden_size,
            out_features=config.vocab_size,
            out_additional_features=config.additional_vocab_size,
            bias=False,
            partially_freeze=config.freeze_lm_head,
        )
        if config.additional_vocab_size > 0:
            self._tied_weights_keys = {
                **type(self)._tied_weights_keys,
                "lm_head.additional_fc.weight": "model.embed_tokens.additional_embedding.weight",
            }
        self.post_init()

    def logits(self, hidden_states: Tensor) -> Tensor:
        """(..., hidden) -> (..., both vocabularies), on the same device."""
        return self.lm_head(hidden_states).to(hidden_states.device)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_encoder_embeddings: Tensor | None = None,
        perceiver_embeddings: Tensor | None = None,
        image_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        interpolate_pos_encoding: bool = False,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> IdeficsOutput:
        """Inputs as in `IdeficsModel.forward`; `labels` (rows, tokens) hold ids, −100 where none counts."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_encoder_embeddings=image_encoder_embeddings,
            perceiver_embeddings=perceiver_embeddings,
            image_attention_mask=image_attention_mask,
            use_cache=use_cache,
            interpolate_pos_encoding=interpolate_pos_encoding,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            # The logits span both vocabularies: their own width counts, not config.vocab_size.
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return IdeficsOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, **model_kwargs: Any
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Images are encoded before rows become beams: the latents are expanded, not the pixels."""
        if expand_size > 1 and model_kwargs.get("image_hidden_states") is None:
            images = {name: model_kwargs.pop(name, None) for name in IMAGE_INPUTS}
            interpolate = model_kwargs.get("interpolate_pos_encoding", False)
            encoded = self.model.encode_images(**images, interpolate_pos_encoding=interpolate)
            model_kwargs["image_hidden_states"] = encoded
        return super()._expand_inputs_for_generation(expand_size, **model_kwargs)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, image_attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The images are what the last forward has encoded, else what the caller gave; tokens beyond the mask see what
        its last token sees."""
        images = {name: kwargs.pop(name, None) for name in IMAGE_INPUTS}
        encoded = kwargs.pop("image_hidden_states", None)
        if encoded is not None:
            images = {"perceiver_embeddings" if self.config.use_resampler else "image_encoder_embeddings": encoded}
        model_inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if image_attention_mask is not None:
            tokens = model_inputs.get("input_ids")
            num_tokens = (tokens if tokens is not None else model_inputs["inputs_embeds"]).shape[1]
            last = image_attention_mask[:, -1:].expand(-1, max(0, num_tokens - image_attention_mask.shape[1]), -1)
            images["image_attention_mask"] = torch.cat([image_attention_mask, last], dim=1)[:, -num_tokens:]
        return {**model_inputs, **images}

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        mask = model_kwargs.get("image_attention_mask")
        if mask is not None:
            last = mask[:, -1:]  # all that the new token needs, where there is a cache
            cached = model_kwargs.get("use_cache", True)
            model_kwargs["image_attention_mask"] = last if cached else torch.cat([mask, last], dim=1)
        model_kwargs["image_hidden_states"] = outputs.image_hidden_states
        return model_kwargs
