//! Failed steps, and what the metrics tell.

use patchbay::engine::FinishReason;

use super::fake::{Fault, request, with_adapter};
use super::world::{ROOMY, Sim, World, finish, prompt, run_alone};

#[test]
fn a_failed_step_ends_its_sequences_and_no_others() {
    for fault in [Fault::Error, Fault::Panic] {
        let world = World { sequences_max: 2, step_tokens_max: 8, prefix_cache: true, ..ROOMY };
        let mut sim = Sim::new(&world);
        for _ in 0..3 {
            sim.submit(request(prompt(4), 3)).unwrap();
        }
        sim.probe.set_fault(fault);
        sim.step();
        assert_eq!(sim.engine.blocks_in_use(), 0);
        sim.run();
        let message = Some("the model failed to compute this request".to_owned());
        assert_eq!([&sim.outcomes[0].failed, &sim.outcomes[1].failed], [&message; 2]);
        assert_eq!(sim.outcomes[2].ids(), run_alone(&request(prompt(4), 3)).ids());
    }
}

#[test]
fn invalid_logits_end_only_their_sequence() {
    let mut sim = Sim::new(&ROOMY);
    sim.submit(request(prompt(4), 3)).unwrap();
    sim.submit(request(prompt(5), 3)).unwrap();
    sim.probe.set_fault(Fault::Nan);
    sim.run();
    assert_eq!(sim.outcomes[0].failed.as_deref(), Some("the model computed invalid numbers for this request"));
    assert_eq!(sim.outcomes[1].ids(), run_alone(&request(prompt(5), 3)).ids());
}

#[test]
fn a_failed_adapter_copy_ends_who_needed_it_and_the_next_try_works() {
    for fault in [Fault::Copy, Fault::CopyPanic] {
        let mut sim = Sim::new(&ROOMY);
        sim.metrics.claim_adapter_label("adapter-1");
        sim.probe.set_fault(fault);
        sim.submit(with_adapter(prompt(4), 2, 1)).unwrap();
        sim.submit(request(prompt(4), 2)).unwrap();
        sim.run();
        assert_eq!(sim.outcomes[0].failed.as_deref(), Some("the adapter could not be copied to the device"));
        assert_eq!(finish(&sim.outcomes[1]), (FinishReason::Length, 2));
        assert_eq!(sim.metrics.adapter_errors.with_label_values(&["adapter-1"]).get(), 1);
        sim.submit(with_adapter(prompt(4), 2, 1)).unwrap();
        sim.run();
        assert_eq!(finish(&sim.outcomes[2]), (FinishReason::Length, 2));
    }
}

#[test]
fn metrics_tell_what_happened() {
    let world = World { prefix_cache: true, ..ROOMY };
    let mut sim = Sim::new(&world);
    sim.metrics.claim_adapter_label("adapter-1");
    sim.submit(with_adapter(prompt(9), 3, 1)).unwrap();
    sim.run();
    sim.submit(with_adapter(prompt(9), 1, 1)).unwrap();
    sim.run();
    let cancelled = sim.submit(request(prompt(4), 50)).unwrap();
    sim.step();
    sim.cancel(cancelled);
    sim.run();
    assert!(sim.submit(request(prompt(128), 1)).is_err());
    let text = sim.metrics.render();
    for line in [
        "vllm:prompt_tokens_total{engine=\"0\",model_name=\"fake\"} 22",
        "vllm:generation_tokens_total{engine=\"0\",model_name=\"fake\"} 5",
        "vllm:prefix_cache_queries_total{engine=\"0\",model_name=\"fake\"} 22",
        "vllm:prefix_cache_hits_total{engine=\"0\",model_name=\"fake\"} 8",
        "vllm:request_success_total{engine=\"0\",finished_reason=\"length\",model_name=\"fake\"} 2",
        "vllm:request_success_total{engine=\"0\",finished_reason=\"abort\",model_name=\"fake\"} 1",
        "vllm:admission_rejections_total{engine=\"0\",model_name=\"fake\",reason=\"prompt_too_long\"} 1",
        "vllm:time_to_first_token_seconds_count{engine=\"0\",model_name=\"fake\"} 3",
        "vllm:inter_token_latency_seconds_count{engine=\"0\",model_name=\"fake\"} 2",
        "vllm:request_time_per_output_token_seconds_count{engine=\"0\",model_name=\"fake\"} 1",
        "vllm:e2e_request_latency_seconds_count{engine=\"0\",model_name=\"fake\"} 2",
        "vllm:request_queue_time_seconds_count{engine=\"0\",model_name=\"fake\"} 3",
        "vllm:kv_cache_usage_perc{engine=\"0\",model_name=\"fake\"} 0",
        "vllm:num_requests_running{engine=\"0\",model_name=\"fake\"} 0",
        "vllm:cache_config_info{block_size=\"4\",enable_prefix_caching=\"true\",engine=\"0\",model_name=\"fake\",num_gpu_blocks=\"256\"} 1",
        "patchbay_adapter_requests_total{adapter=\"adapter-1\"} 2",
        "patchbay_adapter_requests_total{adapter=\"base\"} 1",
        "patchbay_adapter_prompt_tokens_total{adapter=\"adapter-1\"} 18",
        "patchbay_adapter_generation_tokens_total{adapter=\"adapter-1\"} 4",
        "patchbay_adapter_time_to_first_token_seconds_count{adapter=\"adapter-1\"} 2",
        "patchbay_adapter_resident{adapter=\"adapter-1\"} 1",
        "patchbay_adapter_slot_copies_total 1",
    ] {
        assert!(text.lines().any(|other| other == line), "missing {line}\n{text}");
    }
    assert!(text.contains("running_lora_adapters=\"adapter-1\",waiting_lora_adapters=\"\""));
}
