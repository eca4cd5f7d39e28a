//! Making one adapter of several and publishing it as any other.

use super::StoreError;
use super::catalog::{AdapterStatus, PublishOptions, Shared, Store, Target};
use super::name::{check_name, parse_reference};
use super::record::Source;
use crate::adapter::{AdapterFiles, CombineInput, CombineOptions, combine};

impl Store {
    /// Combines the files of these (`name` or `name@generation`, with a weight) and publishes the result as a new
    /// generation of `name`, which may be one of them. This goes on when nobody waits for it any more.
    ///
    /// # Errors
    /// As [`Store::resolve`] and [`Store::publish`]; `TooLarge` where the parts' files together exceed an upload; a refusal
    /// where they cannot be combined. The name's state is unchanged then.
    pub async fn combine(
        &self,
        name: &str,
        parts: &[(String, f32)],
        how: CombineOptions,
        options: &PublishOptions,
    ) -> Result<AdapterStatus, StoreError> {
        check_name(name)?;
        // All files are in memory until the result is published, as an upload is.
        let slot = self.upload_slot().await?;
        let (shared, name, parts, options) = (self.shared.clone(), name.to_owned(), parts.to_vec(), options.clone());
        slot.run(async move {
            let combined = shared.combine(&parts, how).await?;
            shared.publish(&name, combined, &options, Source::Combination).await
        })
        .await
    }
}

impl Shared {
    async fn combine(&self, parts: &[(String, f32)], how: CombineOptions) -> Result<AdapterFiles, StoreError> {
        let limit = self.config.upload_bytes_max;
        let mut left = limit;
        let mut files = Vec::with_capacity(parts.len());
        for (part, weight) in parts {
            let found = self.files(part).await?;
            let bytes = found.config.len().saturating_add(found.weights.len());
            left = left.checked_sub(bytes).ok_or(StoreError::TooLarge { limit })?;
            files.push((part.clone(), *weight, found));
        }
        let permit = self.loads.admit().await?;
        let combined = self.work(permit, move || {
            let inputs = files.iter().map(|(name, weight, files)| CombineInput { name, files, weight: *weight });
            Ok(combine(&inputs.collect::<Vec<_>>(), &how)?)
        });
        combined.await
    }

    /// The files that a reference means now.
    async fn files(&self, reference: &str) -> Result<AdapterFiles, StoreError> {
        let wanted = parse_reference(reference)?;
        match self.find(wanted.name, wanted.generation).await? {
            Target::Published(generation) => self.objects.blob(&generation.digest).await,
            // A directory has one generation that can be read: the one that lies there.
            Target::Directory { .. } if wanted.generation.is_some() => Err(StoreError::NotFound(reference.to_owned())),
            Target::Directory { name, .. } => Ok(self.objects.read_directory(&name).await?.files),
        }
    }
}
