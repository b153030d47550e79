//! What the benchmark turns on and off, to compare requests with and without it.
//!
//! In: whether the file of each feature exists. Out: changes of the model.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use tulle_operator::model::Model;
use tulle_operator::watch::Hub;

/// How often the files are looked for.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Something that is on while a file exists.
pub struct Feature {
    /// The file in the benchmark's folder.
    pub file: &'static str,
    /// Turns it on.
    pub apply: Apply,
    /// Turns it off.
    pub delete: Delete,
}

/// See [`Feature::apply`].
pub type Apply = Box<dyn FnMut(&mut Model) -> Result<()> + Send>;
/// See [`Feature::delete`].
pub type Delete = Box<dyn FnMut(&mut Model) + Send>;

impl Feature {
    /// Something that is in the model, and nowhere else.
    pub fn of_model(file: &'static str, apply: fn(&mut Model) -> Result<()>, delete: fn(&mut Model)) -> Self {
        Self { file, apply: Box::new(apply), delete: Box::new(delete) }
    }
}

/// Turns features on and off.
pub struct Switch {
    hub: Arc<Hub>,
    features: Vec<(Feature, PathBuf, bool)>,
}

impl Switch {
    /// A switch with everything off.
    pub fn new(hub: Arc<Hub>, folder: &Path, features: impl IntoIterator<Item = Feature>) -> Self {
        let off = |feature: Feature| {
            let path = folder.join(feature.file);
            (feature, path, false)
        };
        Self { hub, features: features.into_iter().map(off).collect() }
    }

    /// Looks for the files once.
    ///
    /// # Errors
    /// When something cannot be turned on.
    pub fn turn(&mut self) -> Result<()> {
        let mut done = Ok(());
        for (feature, path, is_on) in &mut self.features {
            let on = path.exists();
            if on == *is_on {
                continue;
            }
            *is_on = on;
            self.hub.change(|model| {
                if on {
                    done = (feature.apply)(model);
                } else {
                    (feature.delete)(model);
                }
            });
        }
        done
    }

    /// Looks for the files again and again.
    pub async fn follow(mut self) {
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            if let Err(error) = self.turn() {
                eprintln!("cannot turn something on: {error:#}");
            }
        }
    }
}
