//! Plain directories, with and without sub-directories.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use patchbay::store::{PublishOptions, StoreConfig, StoreError};
use tempfile::tempdir;

use super::{check_absent, served};
use crate::store_support::{
    Opened, adapter, files_below, mixed_value, mixture, open, open_with, plain, value, write_directory,
};

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
