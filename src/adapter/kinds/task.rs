//! Which task of a file with several an adapter is. PEFT takes the task with each call and saves nothing, so a field that is
//! not PEFT's names it, and each task is an adapter of its own.

use crate::adapter::AdapterError;
use crate::adapter::config::{Config, field_error};

/// The field that names the task, counted from 0.
pub(super) const FIELD: &str = "task_id";

/// The task to serve of a file with `num_tasks`; a file with one needs no field.
pub(super) fn task(config: &Config, num_tasks: usize) -> Result<usize, AdapterError> {
    match config.count(FIELD)? {
        Some(task) if task < num_tasks => Ok(task),
        Some(task) => {
            Err(field_error(FIELD, format!("expected a number below {num_tasks}, the number of tasks, found {task}")))
        }
        None if num_tasks == 1 => Ok(0),
        None => Err(field_error(
            FIELD,
            format!("is missing: the file has {num_tasks} tasks; add the number of the one to serve, counted from 0"),
        )),
    }
}
