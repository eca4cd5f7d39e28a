//! The store from outside: what survives, what others see, what stays within its bounds.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use patchbay::adapter::{AdapterError, AdapterFiles};
use patchbay::store::{PublishOptions, Store, StoreConfig, StoreError};
use proptest::prelude::*;
use tempfile::tempdir;
use tokio::task::JoinSet;

use crate::store_support::{
    DENSE_BYTES, LOW_RANK_BYTES, Opened, adapter, files_below, merged, mixed_value, mixture, open, open_with, plain,
    squares, value, write_directory,
};

async fn served(store: &Store, reference: &str) -> f32 {
    value(&store.resolve(reference).await.expect(reference))
}

async fn check_absent(store: &Store, reference: &str) {
    let error = store.resolve(reference).await.expect_err(reference);
    assert!(matches!(error, StoreError::NotFound(_)), "{reference}: {error}");
}

/// The error and everything below it, as a log shows it.
fn chain(error: &StoreError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

// Publishing

#[tokio::test]
async fn what_is_published_survives_a_restart() {
    let root = tempdir().unwrap();
    let published = open(root.path()).await.store.publish("a", adapter(1.0), &plain()).await.unwrap();
    assert_eq!((published.generation, published.loaded, published.leases), (1, true, 0));
    let report = published.report.as_ref().expect("it was just lowered");
    assert_eq!((report.kind.as_str(), report.modules, report.ranks.as_slice()), ("LORA", 1, &[1][..]));
    assert!(published.load_ms.is_some());

    let Opened { store, .. } = open(root.path()).await;
    let listed = store.list().await.unwrap();
    assert_eq!((listed.len(), &listed[0].digest, listed[0].loaded), (1, &published.digest, false));
    assert_eq!((&listed[0].report, listed[0].created), (&None, published.created));
    assert_eq!(served(&store, "a").await, 1.0);
    assert_eq!(store.status("a").await.unwrap().report, published.report);
}

#[tokio::test]
async fn the_layout_on_disk_is_the_documented_one() {
    let root = tempdir().unwrap();
    let Opened { store, .. } = open(root.path()).await;
    let status = store.publish("a", adapter(1.0), &merged()).await.unwrap();
    store.remove("a").await.unwrap();
    let blob = format!("blobs/sha256/{}", status.digest);
    assert_eq!(
        files_below(root.path()),
        [
            format!("{blob}/adapter_config.json"),
            format!("{blob}/adapter_model.safetensors"),
            "catalog/a/1.json".to_owned(),
            "catalog/a/2.json".to_owned(),
        ]
    );
    let record = fs::read_to_string(root.path().join("catalog/a/1.json")).unwrap();
    let (digest, created) = (status.digest, status.created);
    assert_eq!(
        record,
        format!(
            r#"{{"kind":"publish","digest":"{digest}","options":{{"merge":true}},"created":{created},"source":"upload"}}"#
        )
    );
}

#[tokio::test]
async fn replacing_makes_a_generation_and_leases_keep_the_old_one() {
    let root = tempdir().unwrap();
    let Opened { store, .. } = open(root.path()).await;
    store.publish("a", adapter(1.0), &plain()).await.unwrap();
    let lease = store.resolve("a").await.unwrap();
    assert_eq!(store.status("a").await.unwrap().leases, 1);
    let second = store.publish("a", adapter(2.0), &plain()).await.unwrap();
    assert_eq!((second.generation, second.leases), (2, 0));
    let current = store.resolve("a").await.unwrap();
    assert_eq!((value(&lease), value(&current)), (1.0, 2.0));
    assert_ne!(lease.digest, current.digest);
    // While it is leased the old generation is not loaded a second time; later it is loaded again.
    assert!(Arc::ptr_eq(&lease, &store.resolve("a@1").await.unwrap()));
    drop(lease);
    assert_eq!((served(&store, "a@1").await, served(&store, "a@2").await), (1.0, 2.0));
    check_absent(&store, "a@3").await;
}

#[tokio::test]
async fn merging_changes_the_digest_that_caches_go_by() {
    let root = tempdir().unwrap();
    let Opened { store, .. } = open(root.path()).await;
    let unmerged = store.publish("a", adapter(1.0), &plain()).await.unwrap();
    let lease = store.resolve("a").await.unwrap();
    let dense = store.publish("a", adapter(1.0), &merged()).await.unwrap();
    assert_eq!(unmerged.digest, dense.digest, "the content is the same");
    assert!(dense.merge && dense.report.unwrap().merged);
    let merged = store.resolve("a").await.unwrap();
    assert_ne!(lease.digest, merged.digest);
    assert_eq!((value(&merged), merged.bytes), (1.0, DENSE_BYTES));
}

#[tokio::test]
async fn a_removed_name_is_gone_and_goes_on_counting() {
    let root = tempdir().unwrap();
    let Opened { store, metrics, .. } = open(root.path()).await;
    store.publish("a", adapter(1.0), &plain()).await.unwrap();
    let lease = store.resolve("a").await.unwrap();
    assert!(metrics.render().contains("adapter=\"a\""));
    store.remove("a").await.unwrap();
    assert!(!metrics.render().contains("adapter=\"a\""), "{}", metrics.render());
    assert_eq!(value(&lease), 1.0);
    for reference in ["a", "a@1", "a@2"] {
        check_absent(&store, reference).await;
    }
    assert!(matches!(store.remove("a").await, Err(StoreError::NotFound(_))));
    assert!(matches!(store.status("a").await, Err(StoreError::NotFound(_))));
    assert!(store.list().await.unwrap().is_empty());
    assert_eq!(store.publish("a", adapter(3.0), &plain()).await.unwrap().generation, 3);
    check_absent(&store, "a@1").await;
    assert_eq!(served(&open(root.path()).await.store, "a").await, 3.0);
}

#[tokio::test]
async fn expectations_are_checked() {
    let root = tempdir().unwrap();
    let Opened { store, .. } = open(root.path()).await;
    let expecting = |generation| PublishOptions { expected_generation: Some(generation), ..PublishOptions::default() };
    let conflict = store.publish("a", adapter(1.0), &expecting(1)).await.unwrap_err();
    assert!(matches!(conflict, StoreError::Conflict { expected: 1, found: 0, .. }), "{conflict}");
    store.publish("a", adapter(1.0), &expecting(0)).await.unwrap();
    store.publish("a", adapter(2.0), &expecting(1)).await.unwrap();
    let conflict = store.publish("a", adapter(3.0), &expecting(1)).await.unwrap_err();
    assert!(matches!(conflict, StoreError::Conflict { expected: 1, found: 2, .. }), "{conflict}");
    let new = PublishOptions { must_be_new: true, ..PublishOptions::default() };
    assert!(matches!(store.publish("a", adapter(3.0), &new).await, Err(StoreError::AlreadyExists(_))));
    store.remove("a").await.unwrap();
    store.publish("a", adapter(4.0), &new).await.unwrap();
    assert_eq!(served(&store, "a").await, 4.0);
}

#[tokio::test]
async fn what_is_refused_leaves_nothing_behind() {
    let root = tempdir().unwrap();
    let limit = 4 << 10;
    let config = StoreConfig { root: root.path().to_owned(), upload_bytes_max: limit, ..StoreConfig::default() };
    let Opened { store, metrics, .. } = open_with(config).await;
    let good = adapter(1.0);
    let mut unknown_field = adapter(1.0);
    unknown_field.config = br#"{"peft_type": "LORA", "r": 1, "surprise": true}"#.to_vec();
    let mut truncated = adapter(1.0);
    truncated.weights.truncate(good.weights.len() - 1);
    let large = AdapterFiles { config: vec![b' '; limit], ..good.clone() };
    for files in [unknown_field, truncated, AdapterFiles::default()] {
        let error = store.publish("a", files, &plain()).await.unwrap_err();
        assert!(matches!(error, StoreError::Refused(_)), "{error}");
    }
    assert!(matches!(store.publish("a", large, &plain()).await, Err(StoreError::TooLarge { .. })));
    for name in ["", "..", "a/b", "blobs", "catalog", ".a"] {
        let error = store.publish(name, good.clone(), &plain()).await.unwrap_err();
        assert!(matches!(error, StoreError::InvalidName(_) | StoreError::ReservedName(_)), "{name}: {error}");
    }
    assert!(files_below(root.path()).is_empty());
    assert_eq!((metrics.adapters_loaded.get(), metrics.adapters_loaded_bytes.get()), (0, 0));
    check_absent(&store, "a").await;

    store.publish("a", good, &plain()).await.unwrap();
    let before = files_below(root.path());
    store.publish("a", AdapterFiles::default(), &plain()).await.unwrap_err();
    assert_eq!(files_below(root.path()), before);
    assert_eq!((served(&store, "a").await, store.status("a").await.unwrap().generation), (1.0, 1));
}

// Crashes

#[tokio::test]
async fn a_crash_before_the_record_leaves_the_old_state() {
    let root = tempdir().unwrap();
    let Opened { store, .. } = open(root.path()).await;
    store.publish("a", adapter(1.0), &plain()).await.unwrap();
    let next = store.publish("other", adapter(2.0), &plain()).await.unwrap();
    // As if publishing `adapter(2.0)` as `a` had stopped after the blob, in the middle of writing the record.
    fs::remove_dir_all(root.path().join("catalog/other")).unwrap();
    fs::write(root.path().join("catalog/a/2.json#1"), r#"{"kind":"publi"#).unwrap();
    fs::write(root.path().join(format!("blobs/sha256/{}/adapter_config.json#1", next.digest)), "{").unwrap();

    let Opened { store, .. } = open(root.path()).await;
    assert_eq!(store.list().await.unwrap().len(), 1);
    assert_eq!(served(&store, "a").await, 1.0);
    assert_eq!(store.publish("a", adapter(2.0), &plain()).await.unwrap().generation, 2);
    assert_eq!(served(&store, "a").await, 2.0);
}

#[tokio::test]
async fn a_half_written_blob_is_completed_by_the_next_upload() {
    let root = tempdir().unwrap();
    let Opened { store, .. } = open(root.path()).await;
    let status = store.publish("a", adapter(1.0), &plain()).await.unwrap();
    let weights = root.path().join(format!("blobs/sha256/{}/adapter_model.safetensors", status.digest));
    fs::remove_dir_all(root.path().join("catalog")).unwrap();
    fs::remove_file(weights).unwrap();
    let Opened { store, .. } = open(root.path()).await;
    store.publish("b", adapter(1.0), &plain()).await.unwrap();
    assert_eq!(served(&open(root.path()).await.store, "b").await, 1.0);
}

#[tokio::test]
async fn damaged_content_is_noticed_and_never_served() {
    let root = tempdir().unwrap();
    let status = open(root.path()).await.store.publish("a", adapter(1.0), &plain()).await.unwrap();
    let weights = root.path().join(format!("blobs/sha256/{}/adapter_model.safetensors", status.digest));
    fs::write(&weights, adapter(2.0).weights).unwrap();
    let Opened { store, metrics, .. } = open(root.path()).await;
    let error = store.resolve("a").await.unwrap_err();
    assert!(matches!(error, StoreError::Storage(_)) && chain(&error).contains(&status.digest), "{}", chain(&error));
    assert_eq!(metrics.adapters_loaded.get(), 0);
    assert_eq!(metrics.adapter_errors.with_label_values(&["a"]).get(), 1);
    // Uploading the content again repairs it.
    store.publish("a", adapter(1.0), &plain()).await.unwrap();
    assert_eq!(served(&open(root.path()).await.store, "a@1").await, 1.0);
}

#[tokio::test]
async fn a_record_of_a_later_version_is_an_error_that_names_it() {
    let root = tempdir().unwrap();
    let Opened { store, .. } = open(root.path()).await;
    store.publish("a", adapter(1.0), &plain()).await.unwrap();
    store.publish("b", adapter(2.0), &plain()).await.unwrap();
    fs::write(root.path().join("catalog/a/2.json"), r#"{"kind":"alias","to":"b"}"#).unwrap();
    for store in [store, open(root.path()).await.store] {
        let text = chain(&store.resolve("a").await.unwrap_err());
        assert!(text.contains("catalog/a/2.json") && text.contains("alias"), "{text}");
        assert!(store.publish("a", adapter(3.0), &plain()).await.is_err());
        let names: Vec<String> = store.list().await.unwrap().into_iter().map(|status| status.name).collect();
        assert_eq!(names, ["b"]);
        assert_eq!(served(&store, "b").await, 2.0);
    }
}

// Plain directories

#[tokio::test]
async fn a_plain_directory_is_served_lazily_and_never_written() {
    let root = tempdir().unwrap();
    write_directory(&root.path().join("plain"), &adapter(1.0));
    fs::write(root.path().join("README.md"), "not an adapter").unwrap();
    fs::create_dir(root.path().join("empty")).unwrap();
    let Opened { store, metrics, .. } = open(root.path()).await;
    let listed = store.list().await.unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].name.as_str(), listed[0].generation, listed[0].loaded), ("plain", 1, false));
    assert_eq!((listed[0].digest.as_str(), metrics.adapters_loaded.get()), ("", 0));
    let before = files_below(root.path());
    assert_eq!(served(&store, "plain").await, 1.0);
    assert_eq!(served(&store, "plain@1").await, 1.0);
    check_absent(&store, "plain@2").await;
    let status = store.status("plain").await.unwrap();
    assert!(status.loaded && status.digest.len() == 64 && status.created > 0);
    assert_eq!(files_below(root.path()), before);
    // A directory may also appear later.
    write_directory(&root.path().join("late"), &adapter(2.0));
    assert_eq!(served(&store, "late").await, 2.0);
}

#[tokio::test]
async fn a_changed_directory_is_a_new_generation() {
    let root = tempdir().unwrap();
    let dir = root.path().join("plain");
    write_directory(&dir, &adapter(1.0));
    let Opened { store, .. } = open(root.path()).await;
    let old = store.resolve("plain").await.unwrap();
    // At once and with equal sizes: the modification time may well be the same.
    write_directory(&dir, &adapter(2.0));
    let new = store.resolve("plain").await.unwrap();
    assert_eq!((value(&old), old.generation), (1.0, 1));
    assert_eq!((value(&new), new.generation), (2.0, 2));
    check_absent(&store, "plain@1").await;
    // Touched, not changed.
    write_directory(&dir, &adapter(2.0));
    assert!(Arc::ptr_eq(&new, &store.resolve("plain").await.unwrap()));
    // Broken, then gone: what was served before is not served any more.
    fs::write(dir.join("adapter_model.safetensors"), "x").unwrap();
    assert!(matches!(store.resolve("plain").await, Err(StoreError::Refused(_))));
    fs::remove_dir_all(&dir).unwrap();
    check_absent(&store, "plain").await;
    write_directory(&dir, &adapter(3.0));
    let again = store.resolve("plain").await.unwrap();
    assert_eq!((value(&again), again.generation), (3.0, 3));
}

#[tokio::test]
async fn a_directory_may_name_its_weights_as_adapterhub_does() {
    let root = tempdir().unwrap();
    let dir = root.path().join("plain");
    write_directory(&dir, &adapter(1.0));
    fs::rename(dir.join("adapter_model.safetensors"), dir.join("adapter.safetensors")).unwrap();
    let Opened { store, .. } = open(root.path()).await;
    assert_eq!(served(&store, "plain").await, 1.0);
    // PEFT's name counts where both are there.
    write_directory(&dir, &adapter(2.0));
    assert_eq!(served(&store, "plain").await, 2.0);
    fs::remove_file(dir.join("adapter_model.safetensors")).unwrap();
    assert_eq!(served(&store, "plain").await, 1.0);
}

#[tokio::test]
async fn an_old_directory_is_recognised_without_reading_it() {
    let root = tempdir().unwrap();
    let dir = root.path().join("plain");
    write_directory(&dir, &adapter(1.0));
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        let file = fs::File::options().write(true).open(dir.join(file)).unwrap();
        file.set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000)).unwrap();
    }
    let Opened { store, metrics, .. } = open(root.path()).await;
    let first = store.resolve("plain").await.unwrap();
    assert!(Arc::ptr_eq(&first, &store.resolve("plain").await.unwrap()));
    assert_eq!(metrics.adapter_load_seconds.with_label_values(&["plain"]).get_sample_count(), 1);
    assert_eq!(store.status("plain").await.unwrap().created, 1_000_000);
}

#[tokio::test]
async fn publishing_over_a_directory_goes_on_counting_and_hides_it() {
    let root = tempdir().unwrap();
    write_directory(&root.path().join("plain"), &adapter(1.0));
    let Opened { store, .. } = open(root.path()).await;
    assert_eq!(served(&store, "plain").await, 1.0);
    let options = PublishOptions { expected_generation: Some(1), must_be_new: true, ..PublishOptions::default() };
    assert_eq!(store.publish("plain", adapter(2.0), &options).await.unwrap().generation, 2);
    for store in [store, open(root.path()).await.store] {
        assert_eq!(served(&store, "plain").await, 2.0);
        assert_eq!(store.list().await.unwrap().len(), 1);
        check_absent(&store, "plain@1").await;
    }
    open(root.path()).await.store.remove("plain").await.unwrap();
    check_absent(&open(root.path()).await.store, "plain").await;
    assert!(root.path().join("plain/adapter_config.json").exists());
}

#[tokio::test]
async fn removing_a_directory_hides_it_without_touching_it() {
    let root = tempdir().unwrap();
    write_directory(&root.path().join("plain"), &adapter(1.0));
    open(root.path()).await.store.remove("plain").await.unwrap();
    let Opened { store, .. } = open(root.path()).await;
    check_absent(&store, "plain").await;
    assert!(store.list().await.unwrap().is_empty());
    assert!(root.path().join("plain/adapter_config.json").exists());
    assert_eq!(store.publish("plain", adapter(2.0), &plain()).await.unwrap().generation, 3);
}

#[tokio::test]
async fn a_directory_with_a_pickle_is_refused_with_advice() {
    let root = tempdir().unwrap();
    let dir = root.path().join("old");
    write_directory(&dir, &adapter(1.0));
    fs::rename(dir.join("adapter_model.safetensors"), dir.join("adapter_model.bin")).unwrap();
    let Opened { store, .. } = open(root.path()).await;
    let error = store.resolve("old").await.unwrap_err();
    assert!(matches!(error, StoreError::Refused(_)) && error.to_string().contains("convert it"), "{error}");
}

#[tokio::test]
async fn a_path_is_copied_and_survives_its_source() {
    let (root, extra) = (tempdir().unwrap(), tempdir().unwrap());
    write_directory(&extra.path().join("trained"), &adapter(1.0));
    let config = StoreConfig {
        root: root.path().to_owned(),
        extra_roots: vec![extra.path().to_owned()],
        ..StoreConfig::default()
    };
    let Opened { store, .. } = open_with(config).await;
    let status = store.load_path("a", &extra.path().join("trained"), &plain()).await.unwrap();
    assert_eq!((status.generation, status.loaded), (1, true));
    assert!(matches!(store.load_path("b", Path::new("/etc"), &plain()).await, Err(StoreError::OutsideRoots)));
    assert!(matches!(store.load_path("b", Path::new("absent"), &plain()).await, Err(StoreError::FilesNotFound(_))));
    fs::remove_dir_all(extra.path()).unwrap();
    assert_eq!(served(&open(root.path()).await.store, "a").await, 1.0);
}

// Adapters in sub-directories

#[tokio::test]
async fn adapters_in_sub_directories_survive_a_restart() {
    let root = tempdir().unwrap();
    let Opened { store, .. } = open(root.path()).await;
    let first = store.publish("a", mixture(2.0), &plain()).await.unwrap();
    let second = store.publish("b", mixture(3.0), &plain()).await.unwrap();
    assert_ne!(first.digest, second.digest, "they differ in one of the sub-directories only");
    let below = files_below(root.path());
    let blob = |rest: &str| format!("blobs/sha256/{}/{rest}", first.digest);
    for file in ["adapter_model.safetensors", "0/adapter_config.json", "1/adapter_model.safetensors"].map(blob) {
        assert!(below.contains(&file), "{file} in {below:?}");
    }
    let Opened { store, .. } = open(root.path()).await;
    for (name, value) in [("a", 2.0), ("b", 3.0)] {
        assert_eq!(mixed_value(&store.resolve(name).await.unwrap()), value);
    }
    fs::remove_file(root.path().join(blob("1/adapter_config.json"))).unwrap();
    let Opened { store, .. } = open(root.path()).await;
    assert!(matches!(store.resolve("a").await, Err(StoreError::Storage(_))));
}

#[tokio::test]
async fn the_files_of_sub_directories_count_against_the_bounds() {
    let root = tempdir().unwrap();
    let limit = mixture(2.0).num_bytes() - 1;
    let config = StoreConfig { root: root.path().to_owned(), upload_bytes_max: limit, ..StoreConfig::default() };
    let Opened { store, .. } = open_with(config).await;
    assert!(matches!(store.publish("a", mixture(2.0), &plain()).await, Err(StoreError::TooLarge { .. })));
    write_directory(&root.path().join("plain"), &mixture(2.0));
    assert!(matches!(store.resolve("plain").await, Err(StoreError::TooLarge { .. })));
}

#[tokio::test]
async fn a_changed_sub_directory_is_a_new_generation() {
    let root = tempdir().unwrap();
    let dir = root.path().join("plain");
    write_directory(&dir, &mixture(2.0));
    let Opened { store, .. } = open(root.path()).await;
    let old = store.resolve("plain").await.unwrap();
    assert!(Arc::ptr_eq(&old, &store.resolve("plain").await.unwrap()));
    write_directory(&dir.join("1"), &adapter(3.0));
    let new = store.resolve("plain").await.unwrap();
    assert_eq!((mixed_value(&new), new.generation), (3.0, 2));
    // Without one of them it is not served; with a config that names none it is another adapter.
    fs::remove_dir_all(dir.join("1")).unwrap();
    let error = store.resolve("plain").await.unwrap_err();
    assert!(error.to_string().contains("1/adapter_config.json"), "{error}");
    write_directory(&dir, &adapter(4.0));
    assert_eq!(served(&store, "plain").await, 4.0);
}

#[tokio::test]
async fn an_old_directory_with_sub_directories_is_recognised_without_reading_it() {
    let root = tempdir().unwrap();
    let dir = root.path().join("plain");
    write_directory(&dir, &mixture(2.0));
    for file in files_below(&dir) {
        let file = fs::File::options().write(true).open(dir.join(file)).unwrap();
        file.set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000)).unwrap();
    }
    let Opened { store, metrics, .. } = open(root.path()).await;
    let first = store.resolve("plain").await.unwrap();
    assert!(Arc::ptr_eq(&first, &store.resolve("plain").await.unwrap()));
    assert_eq!(metrics.adapter_load_seconds.with_label_values(&["plain"]).get_sample_count(), 1);
}

#[tokio::test]
async fn a_sub_directory_that_leads_out_of_the_root_is_not_opened() {
    let (root, outside) = (tempdir().unwrap(), tempdir().unwrap());
    let dir = root.path().join("plain");
    write_directory(&dir, &mixture(2.0));
    fs::remove_dir_all(dir.join("1")).unwrap();
    write_directory(outside.path(), &adapter(5.0));
    std::os::unix::fs::symlink(outside.path(), dir.join("1")).unwrap();
    let Opened { store, .. } = open(root.path()).await;
    assert!(matches!(store.resolve("plain").await, Err(StoreError::OutsideRoots)));
}

// Several at once

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
    tokio::task::spawn_blocking({
        let base = base.clone();
        move || base.wait_for_load()
    })
    .await
    .unwrap();
    drop(impatient);
    base.open();
    let adapters = tasks.join_all().await;
    assert!(adapters.iter().all(|adapter| Arc::ptr_eq(adapter, &adapters[0])));
    assert_eq!(metrics.adapter_load_seconds.with_label_values(&["a"]).get_sample_count(), 1);
    // The task that loaded holds one more until it has ended, which nobody waits for.
    assert!(matches!(store.status("a").await.unwrap().leases, 20 | 21));
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
    let waited = base.clone();
    tokio::task::spawn_blocking(move || waited.wait_for_load()).await.unwrap();
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

// Bounds

fn bounded(root: &Path, host_bytes_max: usize, merged_bytes_max: usize) -> StoreConfig {
    StoreConfig { root: root.to_owned(), host_bytes_max, merged_bytes_max, ..StoreConfig::default() }
}

#[tokio::test]
async fn host_memory_holds_the_most_recently_used() {
    let root = tempdir().unwrap();
    let Opened { store, metrics, .. } = open_with(bounded(root.path(), 2 * LOW_RANK_BYTES, 0)).await;
    for (name, value) in [("a", 1.0), ("b", 2.0), ("c", 3.0)] {
        store.publish(name, adapter(value), &plain()).await.unwrap();
    }
    let loaded = async || {
        let listed = store.list().await.unwrap();
        listed.into_iter().filter(|status| status.loaded).map(|status| status.name).collect::<Vec<_>>()
    };
    assert_eq!(loaded().await, ["b", "c"]);
    served(&store, "b").await;
    assert_eq!(served(&store, "a").await, 1.0);
    assert_eq!(loaded().await, ["a", "b"]);
    assert_eq!(metrics.adapters_loaded_bytes.get(), 2 * LOW_RANK_BYTES as i64);
    // The report outlives the load.
    assert!(store.status("c").await.unwrap().report.is_some());
    let leases = (store.resolve("a").await.unwrap(), store.resolve("b").await.unwrap());
    assert!(matches!(store.resolve("c").await, Err(StoreError::Busy)));
    assert_eq!(loaded().await, ["a", "b"]);
    drop(leases);
    assert_eq!(served(&store, "c").await, 3.0);
}

#[tokio::test]
async fn dense_copies_stay_within_their_budget_to_the_byte() {
    let root = tempdir().unwrap();
    let Opened { store, .. } = open_with(bounded(root.path(), 1 << 20, 2 * DENSE_BYTES)).await;
    for (name, value) in [("a", 1.0), ("b", 2.0)] {
        store.publish(name, adapter(value), &merged()).await.unwrap();
    }
    let leases = (store.resolve("a").await.unwrap(), store.resolve("b").await.unwrap());
    let files = files_below(root.path());
    assert!(matches!(store.publish("c", adapter(3.0), &merged()).await, Err(StoreError::Busy)));
    assert_eq!(files_below(root.path()), files);
    store.publish("unmerged", adapter(4.0), &plain()).await.unwrap();
    // A replaced generation counts for as long as it is leased.
    assert!(matches!(store.publish("a", adapter(5.0), &merged()).await, Err(StoreError::Busy)));
    drop(leases);
    store.publish("c", adapter(3.0), &merged()).await.unwrap();
    assert_eq!((served(&store, "a").await, served(&store, "b").await, served(&store, "c").await), (1.0, 2.0, 3.0));
}

#[tokio::test]
async fn a_dense_copy_that_costs_less_is_made_where_the_budget_has_room() {
    let root = tempdir().unwrap();
    let Opened { store, .. } = open_with(bounded(root.path(), 1 << 20, DENSE_BYTES)).await;
    let first = store.publish("a", squares(1.0), &plain()).await.unwrap().report.unwrap();
    assert_eq!(
        (first.own_weight_bytes, first.bytes, first.warnings.as_slice()),
        (DENSE_BYTES, DENSE_BYTES, [].as_slice())
    );
    assert_eq!(served(&store, "a").await, 4.0);
    // While it is in use the budget has no room for another one, which is served all the same.
    let lease = store.resolve("a").await.unwrap();
    let second = store.publish("b", squares(2.0), &plain()).await.unwrap().report.unwrap();
    assert_eq!((second.own_weight_bytes, second.bytes), (0, 4 * LOW_RANK_BYTES));
    assert!(second.warnings.iter().any(|warning| warning.contains("merged_bytes_max")), "{:?}", second.warnings);
    drop(lease);
}

#[tokio::test]
async fn what_alone_exceeds_a_bound_is_refused_and_changes_nothing() {
    let root = tempdir().unwrap();
    let Opened { store, metrics, .. } = open_with(bounded(root.path(), 1 << 20, DENSE_BYTES - 1)).await;
    let error = store.publish("a", adapter(1.0), &merged()).await.unwrap_err();
    let StoreError::Refused(refusal) = &error else { panic!("{error}") };
    assert!(matches!(**refusal, AdapterError::OverBudget { needed: DENSE_BYTES, .. }), "{error}");
    assert!(files_below(root.path()).is_empty());
    assert_eq!(metrics.adapters_loaded_bytes.get(), 0);
    let Opened { store, .. } = open_with(bounded(root.path(), LOW_RANK_BYTES - 1, 0)).await;
    let error = store.publish("a", adapter(1.0), &plain()).await.unwrap_err();
    assert!(matches!(error, StoreError::OverHostMemory { needed: LOW_RANK_BYTES, .. }), "{error}");
    assert!(files_below(root.path()).is_empty());
}

#[tokio::test]
async fn uploads_beyond_the_queue_are_busy() {
    let root = tempdir().unwrap();
    let config =
        StoreConfig { root: root.path().to_owned(), loads_max: 1, load_queue_max: 0, ..StoreConfig::default() };
    let Opened { store, .. } = open_with(config).await;
    write_directory(&root.path().join("plain"), &adapter(1.0));
    let slot = store.upload_slot().await.unwrap();
    assert!(matches!(store.upload_slot().await, Err(StoreError::Busy)));
    assert!(matches!(store.load_path("a", Path::new("plain"), &plain()).await, Err(StoreError::Busy)));
    drop(slot);
    assert!(store.upload_slot().await.is_ok());
    store.load_path("a", Path::new("plain"), &plain()).await.unwrap();
}

// Properties

/// One step of a history: on one of two stores, to one of two names.
#[derive(Clone, Debug)]
enum Step {
    Publish { store: usize, name: usize, value: u8, merge: bool },
    Remove { store: usize, name: usize },
    Resolve { store: usize, name: usize },
    Reopen { store: usize },
}

fn step() -> impl Strategy<Value = Step> {
    let (store, name) = (0..2_usize, 0..2_usize);
    prop_oneof![
        4 => (store.clone(), name.clone(), 1..9_u8, any::<bool>())
            .prop_map(|(store, name, value, merge)| Step::Publish { store, name, value, merge }),
        2 => (store.clone(), name.clone()).prop_map(|(store, name)| Step::Remove { store, name }),
        4 => (store.clone(), name).prop_map(|(store, name)| Step::Resolve { store, name }),
        1 => store.prop_map(|store| Step::Reopen { store }),
    ]
}

async fn check_history(steps: &[Step]) {
    const NAMES: [&str; 2] = ["a", "b"];
    let root = tempdir().unwrap();
    // Room for one adapter of each form, so that most resolves load anew.
    let config = bounded(root.path(), LOW_RANK_BYTES + DENSE_BYTES, DENSE_BYTES);
    let mut stores = [open_with(config.clone()).await.store, open_with(config.clone()).await.store];
    // Per name: records so far, and what it means.
    let mut expected: [(u64, Option<(u64, f32)>); 2] = [(0, None); 2];
    for step in steps {
        match *step {
            Step::Publish { store, name, value, merge } => {
                let options = PublishOptions { merge, ..PublishOptions::default() };
                let value = f32::from(value);
                let status = stores[store].publish(NAMES[name], adapter(value), &options).await.unwrap();
                let (records, meaning) = &mut expected[name];
                *records += 1;
                *meaning = Some((*records, value));
                assert_eq!((status.generation, status.merge), (*records, merge));
            }
            Step::Remove { store, name } => {
                let removed = stores[store].remove(NAMES[name]).await;
                let (records, meaning) = &mut expected[name];
                assert_eq!(removed.is_ok(), meaning.is_some());
                *records += u64::from(meaning.take().is_some());
            }
            Step::Resolve { store, name } => {
                let resolved = stores[store].resolve(NAMES[name]).await.ok();
                let found = resolved.map(|adapter| (adapter.generation, value(&adapter)));
                assert_eq!(found, expected[name].1);
            }
            Step::Reopen { store } => stores[store] = open_with(config.clone()).await.store,
        }
        for store in &stores {
            let listed: Vec<_> = store.list().await.unwrap().into_iter().map(|s| (s.name, s.generation)).collect();
            let wanted = NAMES.iter().zip(&expected);
            let wanted: Vec<_> = wanted.filter_map(|(name, (_, m))| m.map(|m| ((*name).to_owned(), m.0))).collect();
            assert_eq!(listed, wanted);
        }
    }
}

fn block_on(work: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn every_history_means_the_fold_of_its_steps(steps in prop::collection::vec(step(), 1..14)) {
        block_on(check_history(&steps));
    }

    #[test]
    fn arbitrary_uploads_never_panic_and_leave_nothing(
        config in prop::collection::vec(any::<u8>(), 0..200),
        weights in prop::collection::vec(any::<u8>(), 0..200),
        good_config in any::<bool>(),
    ) {
        block_on(async {
            let root = tempdir().unwrap();
            let Opened { store, .. } = open(root.path()).await;
            let config = if good_config { adapter(1.0).config } else { config };
            assert!(store.publish("a", AdapterFiles::new(config, weights.clone()), &plain()).await.is_err());
            assert!(store.publish_archive("a", weights.into(), &plain()).await.is_err());
            assert!(files_below(root.path()).is_empty());
        });
    }
}
