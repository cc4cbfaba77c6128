"""transformers' encoders of text."""

from typing import Any

from zoo.entry import FLOAT32_PARTS, VOCABULARY, Models
from zoo.of_transformers import TEXT, from_config, padded, tokens

MODELS = Models()
add = MODELS.add

_SEQ_CLS = {"task_type": "SEQ_CLS"}


def _encoder(name: str, prefix: str, targets: str, task: str, fields: dict, **options: Any) -> None:
    kind = {"SEQ_CLS": "SequenceClassification", "TOKEN_CLS": "TokenClassification"}[task]
    add(
        name,
        from_config(f"{prefix}For{kind}", f"{prefix}Config", num_labels=3, **fields),
        options.pop("make_inputs", padded),
        {"target_modules": targets.split(), "task_type": task},
        **options,
    )


_encoder("bert", "Bert", "query value dense", "SEQ_CLS", TEXT)
_encoder("bert-tokens", "Bert", "query key", "TOKEN_CLS", TEXT)
_encoder("roberta", "Roberta", "query value", "SEQ_CLS", TEXT)
_encoder("xlm-roberta", "XLMRoberta", "query value", "TOKEN_CLS", TEXT)
_encoder(
    "distilbert",
    "DistilBert",
    "q_lin v_lin lin1",
    "SEQ_CLS",
    {
        "dim": 16,
        "hidden_dim": 24,
        "n_layers": 2,
        "n_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32,
    },
)
# One block for all layers: each adapter is called twice.
_encoder("albert", "Albert", "query value ffn", "SEQ_CLS", {**TEXT, "embedding_size": 8})
_encoder("electra", "Electra", "query value", "SEQ_CLS", {**TEXT, "embedding_size": 8})
_RELATIVE = {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
_encoder("deberta", "Deberta", "in_proj pos_proj", "SEQ_CLS", _RELATIVE)
# The projections also see the relative positions, (1, span, d), that all rows share.
add(
    "deberta-v3",
    from_config(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        **_RELATIVE,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        type_vocab_size=0,
        num_labels=3,
    ),
    padded,
    _SEQ_CLS,
)
add(
    "deberta-v2",
    from_config(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        **_RELATIVE,
        share_att_key=False,
        num_labels=3,
    ),
    padded,
    {"target_modules": ["query_proj", "pos_key_proj", "pos_query_proj"], **_SEQ_CLS},
)
_encoder(
    "modernbert",
    "ModernBert",
    "Wqkv Wo Wi",
    "SEQ_CLS",
    {**TEXT, "local_attention": 4, "cls_token_id": 1, "sep_token_id": 2},
    tolerance=FLOAT32_PARTS,
)
_encoder("mpnet", "MPNet", "q v o", "SEQ_CLS", TEXT)
_encoder(
    "funnel",
    "Funnel",
    "q_head k_head post_proj",
    "SEQ_CLS",
    {
        "vocab_size": VOCABULARY,
        "block_sizes": [1, 1],
        "num_decoder_layers": 1,
        "d_model": 16,
        "n_head": 2,
        "d_head": 8,
        "d_inner": 24,
    },
)
_encoder(
    "convbert",
    "ConvBert",
    "query value",
    "SEQ_CLS",
    {**TEXT, "num_attention_heads": 4, "embedding_size": 16, "conv_kernel_size": 3},
)
_encoder(
    "longformer",
    "Longformer",
    "query value",
    "SEQ_CLS",
    {**TEXT, "attention_window": [4, 4]},
    fold="loop",
    why="Its layers see (time, batch, width).",
)
# Works with the time axis first inside: its hidden states are (T, B, d).
_encoder(
    "xlnet",
    "XLNet",
    "layer_1 layer_2",
    "SEQ_CLS",
    {"vocab_size": VOCABULARY, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24},
    fold="loop",
    why="Its layers see (time, batch, width).",
)
add(
    "fnet",
    from_config("FNetForSequenceClassification", "FNetConfig", **TEXT, num_labels=3),
    tokens(),
    {"target_modules": ["dense"], "modules_to_save": ["classifier"]},
)
_encoder("esm", "Esm", "query value", "SEQ_CLS", {**TEXT, "mask_token_id": 3})
_encoder("roformer", "RoFormer", "query value", "SEQ_CLS", {**TEXT, "embedding_size": 8})
