//! Several requests, publishers and stores at once.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use patchbay::adapter::{AdapterFiles, LoadedAdapter};
use patchbay::store::{PublishOptions, StoreConfig, StoreError};
use tempfile::tempdir;
use tokio::task::JoinSet;

use super::{check_absent, served};
use crate::store_support::{Opened, adapter, merged, open, open_with, plain, squares, value, write_directory};

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn concurrent_requests_load_a_generation_once() {
    let root = tempdir().unwrap();
    open(root.path()).await.store.publish("a", adapter(1.0), &merged()).await.unwrap();
    let Opened { store, base, metrics } = open(root.path()).await;
    base.close();
    let mut tasks = JoinSet::new();
    for _ in 0..20 {
        let store = store.clone();
        tasks.spawn(async move { store.resolve("a").await.unwrap() });
    }
    // One of them gives up meanwhile; the others do not notice.
    let mut impatient = Box::pin(store.resolve("a"));
    assert!(futures::poll!(&mut impatient).is_pending());
    base.wait_for_loads(1).await;
    drop(impatient);
    base.open();
    let adapters = tasks.join_all().await;
    assert!(adapters.iter().all(|adapter| Arc::ptr_eq(adapter, &adapters[0])));
    assert_eq!(metrics.adapter_load_seconds.with_label_values(&["a"]).get_sample_count(), 1);
    // The task that loaded holds one more until it has ended, which nobody waits for.
    assert!(matches!(store.status("a").await.unwrap().leases, 20 | 21));
}

/// Writes an adapter directory whose files were last changed that many seconds after 1970.
fn write_dated(dir: &Path, files: &AdapterFiles, seconds: u64) {
    write_directory(dir, files);
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        let file = fs::File::options().write(true).open(dir.join(file)).unwrap();
        file.set_modified(UNIX_EPOCH + Duration::from_secs(seconds)).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_directory_that_changes_while_it_loads_has_a_generation_for_each_content() {
    let root = tempdir().unwrap();
    let dir = root.path().join("plain");
    let Opened { store, base, .. } = open(root.path()).await;
    base.close();
    let mut loads = Vec::new();
    for (count, value) in [(1, 1.0), (2, 2.0)] {
        write_dated(&dir, &squares(value), 1_000_000 * count as u64);
        let store = store.clone();
        loads.push(tokio::spawn(async move { store.resolve("plain").await.unwrap() }));
        base.wait_for_loads(count).await;
    }
    base.open();
    let mut adapters = Vec::new();
    for load in loads {
        adapters.push(load.await.unwrap());
    }
    assert_eq!(adapters.iter().map(|adapter| value(adapter)).collect::<Vec<_>>(), [4.0, 16.0]);
    assert_ne!(adapters[0].generation, adapters[1].generation);
    assert_eq!(served(&store, "plain").await, 16.0);
}

#[tokio::test]
async fn a_composition_is_of_the_content_and_not_of_its_number() {
    let root = tempdir().unwrap();
    let dir = root.path().join("a");
    write_directory(&dir, &adapter(1.0));
    let (one, two) = (open(root.path()).await.store, open(root.path()).await.store);
    let half = [("a".to_owned(), 0.5)];
    let composed = async || value(&one.compose(&half).await.unwrap().expect("of strength 0.5"));
    assert_eq!(composed().await, 0.5);
    write_directory(&dir, &adapter(2.0));
    assert_eq!(composed().await, 1.0);
    // The other process has not seen that change, and so its first publication is a second generation as well.
    assert_eq!(one.status("a").await.unwrap().generation, 2);
    assert_eq!(two.publish("a", adapter(3.0), &plain()).await.unwrap().generation, 2);
    assert_eq!(composed().await, 1.5);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_composition_that_nobody_waits_for_any_more_still_has_its_turn() {
    let root = tempdir().unwrap();
    let config =
        StoreConfig { root: root.path().to_owned(), loads_max: 1, load_queue_max: 0, ..StoreConfig::default() };
    let Opened { store, base, .. } = open_with(config).await;
    store.publish("a", adapter(1.0), &merged()).await.unwrap();
    base.close();
    let half = [("a".to_owned(), 0.5)];
    let mut first = Box::pin(store.compose(&half));
    tokio::select! {
        _ = &mut first => panic!("composing waits at the gate"),
        () = base.wait_for_loads(1) => {}
    }
    drop(first);
    // The second waits for the same composition, and does not ask for a load of its own beside it.
    let opened = async {
        for _ in 0..50 {
            store.status("a").await.unwrap();
        }
        base.open();
    };
    let (second, ()) = tokio::join!(store.compose(&half), opened);
    let third = store.compose(&half).await.unwrap().unwrap();
    assert!(Arc::ptr_eq(&second.unwrap().unwrap(), &third));
    assert_eq!(value(&third), 0.5);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn requests_that_share_a_failed_load_all_learn_why() {
    let root = tempdir().unwrap();
    let mut broken = adapter(1.0);
    broken.weights.truncate(20);
    write_directory(&root.path().join("broken"), &broken);
    let Opened { store, .. } = open(root.path()).await;
    let mut tasks = JoinSet::new();
    for _ in 0..8 {
        let store = store.clone();
        tasks.spawn(async move { store.resolve("broken").await.unwrap_err() });
    }
    for error in tasks.join_all().await {
        assert!(error.to_string().contains("adapter_model.safetensors"), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn loads_beyond_the_queue_are_busy() {
    let root = tempdir().unwrap();
    let config = |loads_max, load_queue_max| StoreConfig {
        root: root.path().to_owned(),
        loads_max,
        load_queue_max,
        ..StoreConfig::default()
    };
    let setup = open(root.path()).await.store;
    for name in ["a", "b", "c"] {
        setup.publish(name, adapter(1.0), &merged()).await.unwrap();
    }
    let Opened { store, base, .. } = open_with(config(1, 1)).await;
    base.close();
    let running = tokio::spawn({
        let store = store.clone();
        async move { store.resolve("a").await }
    });
    base.wait_for_loads(1).await;
    let (second, third) = (store.resolve("b"), store.resolve("c"));
    // Both ask; one waits, and the other is told to come back. Which is which is a matter of timing.
    let (mut second, mut third) = (Box::pin(second), Box::pin(third));
    let (refused, waiting) = tokio::select! {
        refused = &mut second => (refused, third),
        refused = &mut third => (refused, second),
    };
    assert!(matches!(refused, Err(StoreError::Busy)));
    base.open();
    running.await.unwrap().unwrap();
    waiting.await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_publication_that_nobody_waits_for_any_more_is_done_all_the_same() {
    let root = tempdir().unwrap();
    let config =
        StoreConfig { root: root.path().to_owned(), loads_max: 1, load_queue_max: 1, ..StoreConfig::default() };
    let Opened { store, base, .. } = open_with(config).await;
    base.close();
    let options = merged();
    let mut publishing = Box::pin(store.publish("a", adapter(1.0), &options));
    tokio::select! {
        _ = &mut publishing => panic!("merging waits at the gate"),
        () = base.wait_for_loads(1) => {}
    }
    drop(publishing);
    // It holds the slot until it is done.
    let mut slot = Box::pin(store.upload_slot());
    assert!(futures::poll!(&mut slot).is_pending());
    base.open();
    drop(slot.await.unwrap());
    assert_eq!(served(&store, "a").await, 1.0);
}

/// Returns once nobody but the caller holds the adapter.
async fn wait_until_released(adapter: &Arc<LoadedAdapter>) {
    let alone = async {
        while Arc::strong_count(adapter) > 1 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), alone).await.expect("memory lets go of it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_directory_that_loads_while_its_name_is_published_is_not_kept() {
    let root = tempdir().unwrap();
    write_directory(&root.path().join("a"), &squares(1.0));
    let Opened { store, base, .. } = open(root.path()).await;
    base.close();
    let loading = tokio::spawn({
        let store = store.clone();
        async move { store.resolve("a").await.unwrap() }
    });
    base.wait_for_loads(1).await;
    assert_eq!(store.publish("a", adapter(3.0), &plain()).await.unwrap().generation, 2);
    base.open();
    let old = loading.await.unwrap();
    assert_eq!((value(&old), old.generation), (4.0, 1));
    let status = store.status("a").await.unwrap();
    assert_eq!((status.generation, status.loaded), (2, true));
    assert_eq!(status.report.expect("of what was published").kind, "LORA");
    wait_until_released(&old).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_generation_that_loads_while_its_name_moves_on_is_not_kept() {
    for retires in [false, true] {
        let root = tempdir().unwrap();
        open(root.path()).await.store.publish("a", adapter(1.0), &merged()).await.unwrap();
        let Opened { store, base, metrics } = open(root.path()).await;
        base.close();
        let loading = tokio::spawn({
            let store = store.clone();
            async move { store.resolve("a").await.unwrap() }
        });
        base.wait_for_loads(1).await;
        if retires {
            store.remove("a").await.unwrap();
        } else {
            store.publish("a", adapter(2.0), &plain()).await.unwrap();
        }
        base.open();
        let old = loading.await.unwrap();
        assert_eq!((value(&old), old.generation), (1.0, 1));
        if retires {
            check_absent(&store, "a").await;
            // An answer without an error would mean that the series is there.
            assert!(metrics.adapter_load_seconds.remove_label_values(&["a"]).is_err());
            assert!(metrics.adapter_bytes.remove_label_values(&["a"]).is_err());
        } else {
            assert!(!store.status("a").await.unwrap().report.expect("of the new one").merged);
        }
        wait_until_released(&old).await;
    }
}

#[tokio::test]
async fn stores_on_one_root_see_each_other() {
    let root = tempdir().unwrap();
    let (one, two) = (open(root.path()).await.store, open(root.path()).await.store);
    one.publish("a", adapter(1.0), &plain()).await.unwrap();
    assert_eq!(served(&two, "a").await, 1.0);
    assert_eq!(two.publish("a", adapter(2.0), &plain()).await.unwrap().generation, 2);
    assert_eq!(served(&one, "a").await, 2.0);
    let expected = PublishOptions { expected_generation: Some(1), ..PublishOptions::default() };
    assert!(matches!(one.publish("a", adapter(3.0), &expected).await, Err(StoreError::Conflict { found: 2, .. })));
    one.remove("a").await.unwrap();
    check_absent(&two, "a").await;
    assert!(two.list().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn racing_publishers_each_get_a_generation_of_their_own() {
    const PUBLISHERS: usize = 12;
    let root = tempdir().unwrap();
    write_directory(&root.path().join("a"), &adapter(0.5));
    let mut tasks = JoinSet::new();
    for idx in 0..PUBLISHERS {
        let store = open(root.path()).await.store;
        tasks.spawn(async move {
            let value = (idx + 1) as f32;
            let status = store.publish("a", adapter(value), &plain()).await.unwrap();
            (status.generation, value)
        });
    }
    let mut published = tasks.join_all().await;
    published.sort_by_key(|(generation, _)| *generation);
    let generations: Vec<u64> = published.iter().map(|(generation, _)| *generation).collect();
    assert_eq!(generations, (2..2 + PUBLISHERS as u64).collect::<Vec<_>>());
    let store = open(root.path()).await.store;
    for (generation, value) in &published {
        assert_eq!(served(&store, &format!("a@{generation}")).await, *value);
    }
    assert_eq!(served(&store, "a").await, published[PUBLISHERS - 1].1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_racing_publishers_with_one_expectation_one_wins() {
    let root = tempdir().unwrap();
    let mut tasks = JoinSet::new();
    for idx in 0..8 {
        let store = open(root.path()).await.store;
        let options = PublishOptions { expected_generation: Some(0), ..PublishOptions::default() };
        tasks.spawn(async move { store.publish("a", adapter(idx as f32), &options).await });
    }
    let results = tasks.join_all().await;
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
    assert!(results.iter().flat_map(|result| result.as_ref().err()).all(|e| matches!(e, StoreError::Conflict { .. })));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_name_swapped_under_load_is_wholly_old_or_wholly_new() {
    const SWAPS: u64 = 60;
    const READERS: usize = 6;
    let root = tempdir().unwrap();
    let writer = open(root.path()).await.store;
    let value_of = |generation: u64| generation as f32 / 2.0;
    writer.publish("a", adapter(value_of(1)), &plain()).await.unwrap();
    let mut readers = JoinSet::new();
    for idx in 0..READERS {
        // Half of them share the writer's process.
        let store = if idx % 2 == 0 { writer.clone() } else { open(root.path()).await.store };
        readers.spawn(async move {
            let mut seen = 0;
            let mut requests = 0;
            while seen < SWAPS {
                let adapter = store.resolve("a").await.expect("no request fails");
                assert_eq!(value(&adapter), value_of(adapter.generation));
                assert!(adapter.generation >= seen, "generation {} after {seen}", adapter.generation);
                seen = adapter.generation;
                requests += 1;
            }
            requests
        });
    }
    for generation in 2..=SWAPS {
        let options = if generation % 2 == 0 { merged() } else { plain() };
        let status = writer.publish("a", adapter(value_of(generation)), &options).await.unwrap();
        assert_eq!(status.generation, generation);
    }
    let requests = readers.join_all().await;
    assert!(requests.iter().all(|requests| *requests > 0), "{requests:?}");
    assert_eq!(writer.status("a").await.unwrap().leases, 0);
}
