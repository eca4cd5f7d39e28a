//! What is published: generations, names, and what a crash leaves.

use std::fs;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use patchbay::adapter::AdapterFiles;
use patchbay::store::{PublishOptions, StoreConfig, StoreError};
use tempfile::tempdir;

use super::{chain, check_absent, served};
use crate::store_support::{DENSE_BYTES, Opened, adapter, files_below, merged, open, open_with, plain, value};

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
    unknown_field.config = br#"{"peft_type": "LORA", "r": 1, "surprise": true}"#[..].into();
    let mut truncated = adapter(1.0);
    truncated.weights.truncate(good.weights.len() - 1);
    let large = AdapterFiles { config: vec![b' '; limit].into(), ..good.clone() };
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
async fn weights_that_a_crash_left_staged_go_when_they_are_old() {
    let root = tempdir().unwrap();
    let staging = root.path().join("blobs/staging");
    fs::create_dir_all(&staging).unwrap();
    for (name, hours) in [("old", 25), ("young", 23)] {
        let file = fs::File::create(staging.join(name)).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(hours * 60 * 60)).unwrap();
    }
    open(root.path()).await;
    assert_eq!(files_below(root.path()), ["blobs/staging/young"]);
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
