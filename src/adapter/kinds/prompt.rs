//! Virtual tokens: rows that stand before the prompt as if they were embedded tokens, at positions from 0 on. The types
//! differ in how the rows were trained; what is served is in the file (PEFT 0.21, `PeftModel.get_prompt`).
//!
//! - prompt tuning, P-tuning, CPT: the rows as they are; an encoder or a projection was applied when they were saved
//! - multitask: row i of task t is `prompt_i * (cols_t rows_t)_i`, elementwise

use candle_core::Tensor;

use super::Kind;
use super::task::{self, task};
use crate::adapter::AdapterError;
use crate::adapter::config::{Config, Rule, field_error, wrong_type};
use crate::adapter::lowering::Lowering;

/// The row of prompt tuning.
pub(super) const PROMPT_TUNING: Kind = Kind {
    peft_type: "PROMPT_TUNING",
    title: "Prompt tuning",
    served_as: "virtual tokens before the prompt",
    merged_as: "nothing to merge",
    shared: &[PROMPT],
    fields: &[
        ("num_virtual_tokens", Rule::Read),
        ("token_dim", Rule::Read),
        ("num_transformer_submodules", Rule::Read),
        ("num_layers", Rule::Ignored),
        ("num_attention_heads", Rule::Ignored),
        ("prompt_tuning_init", Rule::Ignored),
        ("prompt_tuning_init_text", Rule::Ignored),
        ("tokenizer_name_or_path", Rule::Ignored),
        ("tokenizer_kwargs", Rule::Ignored),
    ],
    check,
    lower,
    ..Kind::PLAIN
};

/// The row of P-tuning.
pub(super) const P_TUNING: Kind = Kind {
    peft_type: "P_TUNING",
    title: "P-tuning",
    served_as: "virtual tokens; the encoder's output is in the file",
    fields: &[
        ("num_virtual_tokens", Rule::Read),
        ("token_dim", Rule::Read),
        ("num_transformer_submodules", Rule::Read),
        ("num_layers", Rule::Ignored),
        ("num_attention_heads", Rule::Ignored),
        ("encoder_reparameterization_type", Rule::Ignored),
        ("encoder_hidden_size", Rule::Ignored),
        ("encoder_num_layers", Rule::Ignored),
        ("encoder_dropout", Rule::Ignored),
    ],
    ..PROMPT_TUNING
};

/// The row of multitask prompt tuning.
pub(super) const MULTITASK_PROMPT_TUNING: Kind = Kind {
    peft_type: "MULTITASK_PROMPT_TUNING",
    title: "Multitask prompt tuning",
    served_as: "virtual tokens of the task that `task_id` names",
    shared: &[PROMPT, COLS, ROWS],
    fields: &[
        ("num_virtual_tokens", Rule::Read),
        ("token_dim", Rule::Read),
        ("num_transformer_submodules", Rule::Read),
        ("num_tasks", Rule::Read),
        ("num_ranks", Rule::Read),
        (task::FIELD, Rule::Read),
        ("num_layers", Rule::Ignored),
        ("num_attention_heads", Rule::Ignored),
        ("prompt_tuning_init", Rule::Ignored),
        ("prompt_tuning_init_text", Rule::Ignored),
        ("prompt_tuning_init_state_dict_path", Rule::Ignored),
        ("prompt_tuning_init_task", Rule::Ignored),
        ("tokenizer_name_or_path", Rule::Ignored),
        ("tokenizer_kwargs", Rule::Ignored),
    ],
    check: check_multitask,
    lower: lower_multitask,
    ..PROMPT_TUNING
};

/// The row of context-aware prompt tuning.
pub(super) const CPT: Kind = Kind {
    peft_type: "CPT",
    title: "Context-aware prompt tuning",
    served_as: "virtual tokens",
    fields: &[
        ("num_virtual_tokens", Rule::Read),
        ("token_dim", Rule::Read),
        ("num_transformer_submodules", Rule::Read),
        ("cpt_token_ids", Rule::Read),
        ("num_layers", Rule::Ignored),
        ("num_attention_heads", Rule::Ignored),
        ("cpt_mask", Rule::Ignored),
        ("cpt_tokens_type_mask", Rule::Ignored),
        ("opt_weighted_loss_type", Rule::Ignored),
        ("opt_loss_decay_factor", Rule::Ignored),
        ("opt_projection_epsilon", Rule::Ignored),
        ("opt_projection_format_epsilon", Rule::Ignored),
        ("tokenizer_name_or_path", Rule::Ignored),
    ],
    check: check_cpt,
    ..PROMPT_TUNING
};

/// Key of the trained rows, in every file of the prompt family.
pub(super) const PROMPT: &str = "prompt_embeddings";
const COLS: &str = "prefix_task_cols";
const ROWS: &str = "prefix_task_rows";

/// Refuses what the family has no place for; returns the number of virtual tokens.
pub(super) fn num_virtual_tokens(config: &Config) -> Result<usize, AdapterError> {
    for field in ["target_modules", "modules_to_save"] {
        if config.get(field).is_some_and(|value| value.as_array().is_none_or(|items| !items.is_empty())) {
            return Err(field_error(field, "is not served with an adapter that stands before the prompt"));
        }
    }
    let submodules = config.positive("num_transformer_submodules")?.unwrap_or(1);
    if submodules != 1 {
        let reason = format!("expected 1 for a model with a decoder only, found {submodules}");
        return Err(field_error("num_transformer_submodules", reason));
    }
    let number = config.positive("num_virtual_tokens")?;
    number.ok_or_else(|| field_error("num_virtual_tokens", "is missing"))
}

/// Refuses a size in the config that is not the base model's.
pub(super) fn check_size(config: &Config, field: &str, expected: usize) -> Result<(), AdapterError> {
    match config.positive(field)? {
        Some(found) if found != expected => {
            Err(field_error(field, format!("expected {expected}, as the base model has, found {found}")))
        }
        _ => Ok(()),
    }
}

fn check(config: &Config) -> Result<(), AdapterError> {
    config.positive("token_dim")?;
    num_virtual_tokens(config).map(drop)
}

fn check_cpt(config: &Config) -> Result<(), AdapterError> {
    let (field, number) = ("cpt_token_ids", num_virtual_tokens(config)?);
    if let Some(value) = config.get(field) {
        let found = value.as_array().ok_or_else(|| wrong_type(field, "a list of token ids", value))?.len();
        if found != number {
            let reason = format!("expected as many as `num_virtual_tokens`, which is {number}, found {found}");
            return Err(field_error(field, reason));
        }
    }
    check(config)
}

fn check_multitask(config: &Config) -> Result<(), AdapterError> {
    task(config, num_tasks(config)?)?;
    config.positive("num_ranks")?;
    check(config)
}

/// The number of tasks in the file.
fn num_tasks(config: &Config) -> Result<usize, AdapterError> {
    Ok(config.positive("num_tasks")?.unwrap_or(1))
}

/// The file's rows, (n, hidden).
fn rows(lowering: &mut Lowering<'_>) -> Result<Tensor, AdapterError> {
    let number = num_virtual_tokens(&lowering.config)?;
    let hidden_size = lowering.base.shape().hidden_size;
    check_size(&lowering.config, "token_dim", hidden_size)?;
    lowering.require_shared(PROMPT, &[number, hidden_size])
}

fn lower(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    lowering.out.virtual_tokens = Some(rows(lowering)?);
    Ok(())
}

fn lower_multitask(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    let rows = rows(lowering)?;
    let (number, hidden_size) = rows.dims2()?;
    let num_tasks = num_tasks(&lowering.config)?;
    let task = task(&lowering.config, num_tasks)?;
    let num_ranks = lowering.config.positive("num_ranks")?.unwrap_or(1);
    let task_cols = lowering.require_shared(COLS, &[num_tasks, number, num_ranks])?.get(task)?;
    let task_rows = lowering.require_shared(ROWS, &[num_tasks, num_ranks, hidden_size])?.get(task)?;
    lowering.out.virtual_tokens = Some((rows * task_cols.matmul(&task_rows)?)?);
    Ok(())
}
