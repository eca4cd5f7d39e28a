//! Kinds of PEFT that cannot be served as they are: each with what its user can do.

/// A kind that is not served.
#[derive(Clone, Copy, Debug)]
pub struct Refused {
    /// `peft_type` in the config.
    pub peft_type: &'static str,
    /// Why it is not served, and what to do instead.
    pub reason: &'static str,
}

/// Every kind that is known and not served.
pub static REFUSED: &[Refused] = &[
    Refused {
        peft_type: "LILY",
        reason: "its router averages over all tokens of a batch, so an answer would depend on the requests beside it; \
                 train a LoRA instead",
    },
    Refused {
        peft_type: "ADAMSS",
        reason: "the file lacks the clustering of the weight's rows, which PEFT finds anew with random numbers; merge it \
                 with PEFT (`merge_and_unload`) and serve the merged model, or take a LoRA from the merged weights",
    },
    Refused {
        peft_type: "PSOFT",
        reason: "the file lacks the factors A and B, and the signs of the singular vectors that PEFT takes them from depend \
                 on the machine; convert it with PEFT (`save_as_lora`), which gives an exact LoRA of the same rank",
    },
    Refused {
        peft_type: "SHADOW",
        reason: "a second, smaller transformer runs beside the base and changes the input of every block, so nothing can \
                 be merged or added to a weight; train another kind of adapter",
    },
];
