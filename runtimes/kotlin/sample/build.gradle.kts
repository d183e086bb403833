import org.jetbrains.kotlin.gradle.dsl.JvmTarget

plugins {
    alias(libs.plugins.android.application)
    alias(libs.plugins.kotlin.android)
}

// The bundle that the app shows: `mvmoe-export ckpt.pt --target onnx --out runtimes/kotlin/sample/src/main/assets/bundle.mvmoe`.
// Its digest pins it (`mvmoe-inspect` shows it). With an address, files that are not among the assets are downloaded.
val bundleDigest = providers.gradleProperty("bundleDigest").orElse("")
val bundleAddress = providers.gradleProperty("bundleAddress").orElse("")

android {
    namespace = "mvmoe.sample"
    compileSdk = 36
    defaultConfig {
        applicationId = "mvmoe.sample"
        minSdk = 26
        targetSdk = 36
        versionCode = 1
        versionName = "0.1.0"
        buildConfigField("String", "BUNDLE_DIGEST", "\"${bundleDigest.get()}\"")
        buildConfigField("String", "BUNDLE_ADDRESS", "\"${bundleAddress.get()}\"")
        ndk {
            abiFilters += listOf("arm64-v8a", "x86_64")
        }
    }
    buildFeatures {
        buildConfig = true
    }
    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_11
        targetCompatibility = JavaVersion.VERSION_11
    }
}

kotlin {
    compilerOptions {
        jvmTarget = JvmTarget.JVM_11
        allWarningsAsErrors = true
    }
}

dependencies {
    implementation(project(":onnxruntime"))
    implementation(libs.onnxruntime.android)
    implementation(libs.activity)
    implementation(libs.camera.camera2)
    implementation(libs.camera.lifecycle)
    implementation(libs.camera.view)
}
